"""Which axes change together, and how to change them: what pruning shrinks and alignment grows."""

from .analysis import Dimensions, Group, Member
from .layout import Concat, Dim, Hold, Product, Term

__all__ = ["Concat", "Dim", "Dimensions", "Group", "Hold", "Member", "Product", "Term"]
