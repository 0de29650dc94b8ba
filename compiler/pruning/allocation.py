"""How much each dimension shrinks, so that the whole meets a goal at the least loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ..dimensions import Dim, Group
from .cost import CostModel
from .importance import Ranking

_TINY = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A dimension that may shrink.

    Attributes:
        ranking: its positions, and what they are worth.
        alone: the error that the outputs get when it alone shrinks to `tried` positions; None where not measured.
        multiple: what its size should be a multiple of.
        least: the fewest positions that it may have.
    """

    group: Group
    ranking: Ranking
    multiple: int
    least: int
    alone: float | None = None
    tried: int = 0

    def sizes(self) -> list[int]:
        """The sizes that it may have, from its own down."""
        below = range((self.group.size - 1) // self.multiple * self.multiple, self.least - 1, -self.multiple)
        return [self.group.size, *below]

    def nearest(self, size: float) -> int:
        """The size that it may have nearest to one wanted; the larger of two."""
        return min(self.sizes(), key=lambda one: (abs(one - size), -one))

    def loss(self, size: int) -> float:
        """What shrinking to a size costs: the squared error of the outputs where that was measured at one size."""
        loss = float(self.ranking.loss[self.group.size - size])
        measured = float(self.ranking.loss[self.group.size - self.tried])
        # Nothing is lost by the ranking where dead neurons go, which says nothing of those that are alive.
        return loss if self.alone is None or measured <= _TINY else loss * self.alone**2 / measured


def by_ratio(candidates: Sequence[Candidate], ratios: Mapping[str, float]) -> dict[Dim, int]:
    """Each dimension loses a share of its own positions."""
    return {c.group.dim: c.nearest(c.group.size * (1 - ratios[c.group.name])) for c in candidates}


def to_share(candidates: Sequence[Candidate], share: float) -> dict[Dim, int]:
    """All dimensions together keep a share of their positions, the least important ones go first."""
    wanted = share * sum(candidate.group.size for candidate in candidates)
    return _descend(candidates, _Positions(candidates), wanted)


def to_cost(candidates: Sequence[Candidate], model: CostModel, wanted: float) -> dict[Dim, int]:
    """The graph costs at most `wanted`; each step takes what costs the least loss for what it saves.

    Where even the smallest sizes cost more, these.
    """
    return _descend(candidates, model, wanted)


def _descend(candidates: Sequence[Candidate], model: CostModel, wanted: float) -> dict[Dim, int]:
    sizes = {candidate.group.dim: candidate.group.size for candidate in candidates}
    total = model.total(sizes)
    open_ = list(candidates)
    while total > wanted and open_:
        steps = [found for candidate in open_ if (found := _step(candidate, model, sizes)) is not None]
        if not steps:
            break
        best = min(steps, key=lambda step: step.price)
        sizes[best.candidate.group.dim] = best.size
        total -= best.saved
        open_ = [step.candidate for step in steps]
    return sizes


@dataclasses.dataclass(frozen=True)
class _Step:
    candidate: Candidate
    size: int
    saved: float
    price: float


def _step(candidate: Candidate, model: CostModel, sizes: Mapping[Dim, int]) -> _Step | None:
    """The step down from the present size with the least loss for what it saves, be it to the next size or farther."""
    dim, now = candidate.group.dim, sizes[candidate.group.dim]
    before = model.touched(dim, sizes)
    best: _Step | None = None
    for size in candidate.sizes():
        if size < now:
            saved = before - model.touched(dim, {**sizes, dim: size})
            loss = candidate.loss(size) - candidate.loss(now)
            if saved > 0 and (best is None or loss / saved < best.price):
                best = _Step(candidate, size, saved, loss / saved)
    return best


class _Positions:
    """The number of positions as a cost."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._dims = [candidate.group.dim for candidate in candidates]

    def total(self, sizes: Mapping[Dim, int]) -> float:
        return sum(sizes[dim] for dim in self._dims)

    def touched(self, dim: Dim, sizes: Mapping[Dim, int]) -> float:
        return sizes[dim]
