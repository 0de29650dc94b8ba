"""From a model to a graph that reproduces it."""

from .capture import Captured, capture

__all__ = ["Captured", "capture"]
