"""`enginesmith compare`: two bundles or engines side by side, in results and in speed, with a verdict on the second."""

from .comparison import compare
from .rules import Rules

__all__ = ["Rules", "compare"]
