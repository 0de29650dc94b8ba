"""Which nodes a smaller type harms: the error that each unit of a graph alone makes, and what stays as it is."""

from __future__ import annotations

from .choice import Choice, Point, choose
from .evaluation import Evaluation
from .ranking import Sensitivity, rank
from .units import Unit, split

__all__ = ["Choice", "Evaluation", "Point", "Sensitivity", "Unit", "choose", "rank", "split"]
