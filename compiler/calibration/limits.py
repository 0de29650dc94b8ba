"""The range to quantize a tensor in, chosen from its statistics by one of five methods.

    minmax          all values fit
    moving-average  what batches reach on average (torch's MovingAverageMinMaxObserver)
    percentile      a share of the values is clipped: of |x| where symmetric, half of it at either end where not
    entropy         least Kullback-Leibler divergence of the quantized from the original distribution (S. Migacz, 8-bit
                    inference with TensorRT, GTC 2017)
    mse             least expected squared error, of rounding and clipping together

The last two leave zeros out: these are quantized without error whatever the range, and there may be many.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from .histogram import Histogram
from .statistics import TensorStatistics

Method = Literal["minmax", "moving-average", "percentile", "entropy", "mse"]
METHODS: tuple[Method, ...] = get_args(Method)

PERCENTILE = 99.99

_CANDIDATES = 96
_NARROWEST = 1 / 512
"""Candidates for a limit reach from this part of the largest value to all of it, in equal ratios."""
_EPSILON = 1e-4  # what Q gets where it is zero and P is not, as in ONNX Runtime

_Cost = Callable[[float, float], float]


def limits(
    statistics: TensorStatistics, method: Method, *, symmetric: bool, levels: int = 256, percentile: float = PERCENTILE
) -> tuple[float, float]:
    """The smallest and largest value to represent. Zero lies within; symmetric limits are the negatives of each other.

    Args:
        statistics: with detail "full" for the last three methods.
        method: see above.
        symmetric: whether zero must be the middle.
        levels: how many values the quantized type has; symmetric ones use ``(levels - 1) // 2`` on either side.
        percentile: how many percent of the values fit, for that method.

    Raises:
        ValueError: the method needs a histogram, and the statistics have ranges alone.
    """
    low, high = statistics.low, statistics.high
    if method == "moving-average":
        low, high = statistics.average_low, statistics.average_high
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    if method in ("minmax", "moving-average") or low == high:
        return low, high
    if statistics.histogram is None:
        raise ValueError(f"method {method!r} needs a histogram: collect statistics with detail='full'")
    histogram = _mirrored(statistics.histogram) if symmetric else statistics.histogram
    if method == "percentile":
        low, high = _percentile(histogram, low, high, percentile)
        return (-high, high) if symmetric else (low, high)
    cost = (_divergence if method == "entropy" else _squared_error)(
        _without_zeros(histogram, statistics.zeros * (2 if symmetric else 1)), levels, symmetric
    )
    return _search_symmetric(cost, high) if symmetric else _search(cost, low, high)


def _mirrored(histogram: Histogram) -> Histogram:
    """The histogram of x and -x together."""
    below, above = histogram.counts[: -histogram.first][::-1], histogram.counts[-histogram.first :]
    side = np.zeros(max(len(below), len(above)))
    side[: len(below)] += below
    side[: len(above)] += above
    return Histogram(np.concatenate([side[::-1], side]), -len(side), histogram.width)


def _without_zeros(histogram: Histogram, zeros: float) -> Histogram:
    """Takes zeros out of the bin that begins at zero; of a mirrored histogram, from the one below it as well."""
    counts = histogram.counts.copy()
    above = -histogram.first
    taken = min(zeros, counts[above])
    counts[above] -= taken
    if zeros > taken and above:
        counts[above - 1] = max(counts[above - 1] - (zeros - taken), 0.0)
    return Histogram(counts, histogram.first, histogram.width)


def _percentile(histogram: Histogram, low: float, high: float, percentile: float) -> tuple[float, float]:
    total = np.cumsum(histogram.counts)
    tail = (1 - percentile / 100) / 2
    edges = histogram.edges
    lower = np.interp(tail * total[-1], np.concatenate([[0.0], total]), edges)
    upper = np.interp((1 - tail) * total[-1], np.concatenate([[0.0], total]), edges)
    return max(low, min(float(lower), 0.0)), min(high, max(float(upper), 0.0))


def _search_symmetric(cost: _Cost, high: float) -> tuple[float, float]:
    peak = _best(lambda value: cost(-value, value), high)
    return -peak, peak


def _search(cost: _Cost, low: float, high: float) -> tuple[float, float]:
    """Moves one limit at a time, twice."""
    fitted_low, fitted_high = low, high
    for _ in range(2):
        fitted_high = _best(functools.partial(cost, fitted_low), high)
        fitted_low = -_best(functools.partial(_lower, cost, fitted_high), -low)
    return fitted_low, fitted_high


def _lower(cost: _Cost, high: float, depth: float) -> float:
    return cost(-depth, high)


def _best(cost: Callable[[float], float], peak: float) -> float:
    """The candidate of least cost between a part of `peak` and all of it; the largest of equal ones."""
    if peak <= 0:
        return 0.0
    candidates = peak * np.geomspace(1.0, _NARROWEST, _CANDIDATES)
    costs = [cost(float(value)) for value in candidates]
    return float(candidates[int(np.argmin(costs))])


def _squared_error(histogram: Histogram, levels: int, symmetric: bool) -> _Cost:
    """Where a bin is wider than a step, its values lie anywhere between two levels: the mean error is step**2 / 12."""
    used = np.flatnonzero(histogram.counts)
    counts, centers = histogram.counts[used], histogram.centers[used]

    def cost(low: float, high: float) -> float:
        least, step = _grid(low, high, levels, symmetric)
        most = -least if symmetric else levels - 1 + least
        number = np.rint(centers / step)
        errors = (centers - np.clip(number, least, most) * step) ** 2
        if histogram.width >= step:
            errors[(number >= least) & (number <= most)] = step**2 / 12
        return float(errors @ counts)

    return cost


def _grid(low: float, high: float, levels: int, symmetric: bool) -> tuple[int, float]:
    """Number of the lowest level, zero being 0, and the step between levels."""
    if symmetric:
        half = (levels - 1) // 2
        return -half, high / half
    step = (high - low) / (levels - 1)
    return round(low / step), step


def _divergence(histogram: Histogram, levels: int, symmetric: bool) -> _Cost:
    """P: the bins within the limits, what is beyond them in the outermost; Q: P without that, merged into the levels
    and spread again over the bins that are not empty. A range of fewer bins than levels loses nothing and is refused.
    """
    counts, first, width = histogram.counts, histogram.first, histogram.width
    total = np.concatenate([[0.0], np.cumsum(counts)])
    steps = levels - 1 if symmetric else levels

    def cost(low: float, high: float) -> float:
        start = max(int(np.floor(low / width)) - first, 0)
        stop = min(int(np.ceil(high / width)) - first, len(counts))
        bins = stop - start
        if bins < steps:
            whole = start == 0 and stop == len(counts)
            return 0.0 if whole else np.inf
        inside = counts[start:stop]
        if not inside.any():
            return 0.0 if bins == len(counts) else np.inf
        reference = inside.copy()
        reference[0] += total[start]
        reference[-1] += total[-1] - total[stop]
        begins = np.arange(steps) * bins // steps
        present = inside > 0
        sums = np.add.reduceat(inside, begins)
        filled = np.add.reduceat(present.astype(np.float64), begins)
        spread = np.repeat(sums / np.maximum(filled, 1), np.diff(begins, append=bins)) * present
        p, q = reference / reference.sum(), spread / max(spread.sum(), 1e-300)
        q[(q == 0) & (p > 0)] = _EPSILON / bins
        known = p > 0
        return float(np.sum(p[known] * np.log(p[known] / q[known])))

    return cost
