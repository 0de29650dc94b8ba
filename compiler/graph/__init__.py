"""The graph that passes rewrite: a wrapper of onnx_ir's model, its verifier, and how to run and measure it."""

from .graph import Graph

__all__ = ["Graph"]
