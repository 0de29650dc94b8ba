"""Ranks units by the error that each makes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ..graph import Graph
from .evaluation import Evaluation, number
from .units import Unit

Lower = Callable[[Collection[str]], Graph]
"""Lowers a graph but for the nodes with these labels, and gives a graph that ONNX Runtime's CPU runs."""


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What a unit does when it alone is lowered.

    Attributes:
        error: root mean square over the samples of the relative L2 of the worst output; infinite where there are NaN.
        cost: share of the model's multiply-adds that stay as they are where this unit does.
    """

    unit: Unit
    error: float
    cost: float

    def record(self) -> dict[str, Any]:
        """As JSON; an infinite error is None."""
        return {
            "unit": self.unit.name,
            "nodes": list(self.unit.nodes),
            "error": number(self.error),
            "cost": self.cost,
        }


def rank(
    lower: Lower, units: Sequence[Unit], evaluation: Evaluation, cost: Callable[[Collection[str]], float]
) -> list[Sensitivity]:
    """The units from the most to the least harmful; equal ones in the graph's order.

    Raises:
        GraphError: ONNX Runtime refuses a variant.
    """
    everything = {name for unit in units for name in unit.nodes}
    found = []
    for unit in units:
        error = evaluation.measure(lower(everything - set(unit.nodes))).error
        found.append(Sensitivity(unit, error, cost(unit.nodes)))
    return sorted(found, key=lambda sensitivity: -sensitivity.error)
