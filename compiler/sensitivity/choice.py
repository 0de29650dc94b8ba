"""Chooses what stays: as few units as the budget asks for, from the most harmful on.

Two orders are tried: by error alone, and by squared error (errors of units add up so) per cost. The number of units is
searched by doubling, then by bisection; every number is measured, not estimated. Of the cheaper choice units are won
back: each is lowered after all, or but for its light nodes, where the budget still holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

from .evaluation import Evaluation, number
from .ranking import Lower, Sensitivity
from .units import Unit

MOST_RUNS = 16
"""How many variants winning back may run."""

_LEAST_COST = 1e-3
"""So that a unit without multiply-adds, whose casts cost something too, is not free."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A measured choice.

    Attributes:
        kept: labels of the nodes that stay.
        units: how many units from the front of the ranking stay; None where it is another choice.
        error: as in `Sensitivity`; infinite where there are NaN.
        value: what the budget bounds.
        cost: share of the model's multiply-adds that stay.
    """

    kept: frozenset[str]
    units: int | None
    error: float
    value: float
    cost: float
    holds: bool

    def record(self) -> dict[str, Any]:
        """As JSON, without the nodes; an infinite number is None."""
        return {
            "kept": self.units,
            "nodes": len(self.kept),
            "error": number(self.error),
            "value": number(self.value),
            "cost": self.cost,
            "holds": self.holds,
        }


@dataclasses.dataclass(frozen=True)
class Choice:
    """The chosen point, and all that were measured, by cost."""

    chosen: Point
    curve: tuple[Point, ...]


def choose(
    lower: Lower, ranking: Sequence[Sensitivity], evaluation: Evaluation, cost: Callable[[Collection[str]], float]
) -> Choice:
    """Finds the cheapest choice for which the budget holds.

    Where all units stay, nothing is lowered, and the budget holds by itself.

    Raises:
        GraphError: ONNX Runtime refuses a variant.
    """
    search = _Search(lower, evaluation, cost)
    by_cost = sorted(ranking, key=lambda entry: -(entry.error**2) / (entry.cost + _LEAST_COST))
    found = [search.fewest(ranking, counted=True), search.fewest(by_cost, counted=False)]
    chosen = search.win_back(min(found, key=lambda point: (point.cost, len(point.kept))), [e.unit for e in ranking])
    return Choice(chosen, tuple(sorted(search.points.values(), key=lambda point: (point.cost, len(point.kept)))))


class _Search:
    """Measures choices, each once."""

    def __init__(self, lower: Lower, evaluation: Evaluation, cost: Callable[[Collection[str]], float]) -> None:
        self._lower, self._evaluation, self._cost = lower, evaluation, cost
        self.points: dict[frozenset[str], Point] = {}

    def fewest(self, order: Sequence[Sensitivity], *, counted: bool) -> Point:
        """As few units from the front of an order as the budget needs."""

        def at(units: int) -> Point:
            kept = frozenset(name for entry in order[:units] for name in entry.unit.nodes)
            return self._measure(kept, units if counted else None)

        low, high = -1, 0
        while high < len(order) and not at(high).holds:
            low, high = high, min(max(1, 2 * high), len(order))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if at(middle).holds else (middle, high)
        return at(high)

    def win_back(self, point: Point, units: Sequence[Unit]) -> Point:
        """Lowers kept units, the costliest first, or their heavy nodes alone, where the budget still holds."""
        last = self._evaluation.runs + MOST_RUNS
        kept = [unit for unit in units if not point.kept.isdisjoint(unit.nodes)]
        for unit in sorted(kept, key=lambda unit: -self._cost(unit.nodes)):
            for part in dict.fromkeys((unit.nodes, unit.heavy)):
                if not part or self._evaluation.runs >= last:
                    continue
                candidate = self._measure(point.kept - set(part), None)
                if candidate.holds:
                    point = candidate
                    break
        return point

    def _measure(self, kept: frozenset[str], units: int | None) -> Point:
        if kept not in self.points:
            meter = self._evaluation.measure(self._lower(kept))
            self.points[kept] = Point(kept, units, meter.error, meter.value, self._cost(kept), meter.holds)
        return self.points[kept]
