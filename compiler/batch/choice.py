"""Decisions on a curve of batch sizes. Needs the standard library only, for loading an engine asks too."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ..manifest import BatchCurve, BatchPoint

SATURATED = 0.95
"""Share of the highest throughput at which a batch size saturates the machine."""

CALLS = 200
"""Calls that a p99 needs at least: two of them lie beyond it."""

BETWEEN = 3
"""Sizes that are measured between two neighbours where a decision falls between them."""


def saturation(points: Sequence[BatchPoint]) -> int | None:
    """The smallest batch with 95 % of the highest throughput; None where nothing was measured."""
    rates = _rates(points)
    return min((batch for batch, rate in rates.items() if rate >= SATURATED * max(rates.values())), default=None)


def best(points: Sequence[BatchPoint], p99_limit_ms: float | None, at_most: int | None = None) -> int | None:
    """The batch with the most throughput whose p99 is within the limit; None where no batch is.

    Args:
        at_most: the largest batch that may be chosen.
    """
    allowed = [
        point for point in points if (at_most is None or point["batch"] <= at_most) and _within(point, p99_limit_ms)
    ]
    rates = _rates(allowed)
    return max(rates, key=lambda batch: rates[batch], default=None)


def refinements(points: Sequence[BatchPoint], p99_limit_ms: float | None) -> list[int]:
    """Sizes to measure next: between the saturation and its lower neighbour, and from the best to where p99 is missed.

    They come with the sizes that they have to be compared with; empty where nothing lies between.
    """
    timed = sorted(_rates(points))
    if len(timed) < 2:
        return []
    by_batch = {point["batch"]: point for point in points}
    gaps = []
    for low, high in itertools.pairwise(timed):
        if high == saturation(points):
            gaps.append((low, high))
        if low == best(points, p99_limit_ms) and not _within(by_batch[high], p99_limit_ms):
            gaps.append((low, high))
    new = {size for low, high in gaps for size in _between(low, high)}
    if not new:
        return []
    fastest = best(points, None)
    assert fastest is not None
    return sorted({*new, *itertools.chain.from_iterable(gaps), fastest})


def best_within(curve: BatchCurve, at_most: int | None) -> int | None:
    """The best batch of a curve that a deployed engine takes: one searched beyond its declared range has no use."""
    return best(curve["points"], curve["p99_limit_ms"], at_most)


def missed(curves: Sequence[BatchCurve]) -> str:
    """Why the limit on p99 was missed; empty where an engine keeps it, or where there is none, or nothing was run."""
    limited = [curve for curve in curves if curve["p99_limit_ms"] is not None and curve["largest"]]
    if not limited or any(curve["best"] is not None for curve in limited):
        return ""
    return "; ".join(f"{curve['engine']}: {unmet(curve)}" for curve in limited)


def unmet(curve: BatchCurve) -> str:
    """That no batch keeps the limit, in words."""
    timed = [point for point in curve["points"] if point["p99_ms"] is not None]
    text = f"no batch size keeps a p99 of {curve['p99_limit_ms']:g} ms"
    if not timed:
        return f"{text}: none could be timed"
    return f"{text}, the smallest, {timed[0]['batch']}, takes {timed[0]['p99_ms']:.3g} ms"


def _within(point: BatchPoint, limit_ms: float | None) -> bool:
    p99_ms = point["p99_ms"]
    return limit_ms is None or (p99_ms is not None and p99_ms <= limit_ms)


def _rates(points: Sequence[BatchPoint]) -> dict[int, float]:
    return {point["batch"]: rate for point in points if (rate := point["samples_per_s"]) is not None}


def _between(low: int, high: int) -> list[int]:
    steps = (low + (high - low) * number // (BETWEEN + 1) for number in range(1, BETWEEN + 1))
    return [size for size in dict.fromkeys(steps) if low < size < high]
