"""A histogram whose range grows with the data, in one pass and without error.

Bins are ``[i * 2**k, (i + 1) * 2**k)``. When a value lies beyond the last bin, ``k`` grows and neighbouring bins merge:
bin ``i`` becomes bin ``i >> shift``. So zero is always an edge, and no count ever moves to where its values are not.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

BITS = 12
BINS = 1 << BITS
"""Bins on each side of zero; the larger side fills at least half of them."""
_LOWEST = -126  # 2**-k must be a float32


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts of values by size.

    Attributes:
        counts: float64, estimates where the values are a sample of a larger tensor.
        first: number of the first bin; bin ``i`` of `counts` begins at ``(first + i) * width``.
        width: a power of two.
    """

    counts: np.ndarray
    first: int
    width: float

    @property
    def edges(self) -> np.ndarray:
        """Where the bins begin, and where the last one ends."""
        return (self.first + np.arange(len(self.counts) + 1)) * self.width

    @property
    def centers(self) -> np.ndarray:
        """The middle of each bin."""
        return (self.first + np.arange(len(self.counts)) + 0.5) * self.width


class Growing:
    """A histogram that values are added to."""

    def __init__(self) -> None:
        self._counts = np.zeros(2 * BINS)
        self._exponent: int | None = None

    def add(self, values: np.ndarray, weight: float) -> None:
        """Counts finite float32 values, each `weight` times."""
        peak = max(abs(float(values.min())), abs(float(values.max()))) if values.size else 0.0
        if peak == 0:
            self._counts[BINS] += weight * values.size
            return
        self._grow(max(math.frexp(peak)[1] - BITS, _LOWEST))
        bins = np.floor(values * np.float32(2.0**-self._grown)).astype(np.int32)
        bins += BINS
        counts = np.bincount(bins, minlength=2 * BINS)
        self._counts += weight * counts

    @property
    def _grown(self) -> int:
        return self._exponent if self._exponent is not None else _LOWEST

    def _grow(self, exponent: int) -> None:
        shift = 0 if self._exponent is None else exponent - self._exponent
        if self._exponent is not None and shift <= 0:
            return
        if shift:
            merged = (np.arange(-BINS, BINS) >> min(shift, 31)) + BINS
            self._counts[:] = np.bincount(merged, weights=self._counts, minlength=2 * BINS)
        self._exponent = exponent

    def result(self) -> Histogram:
        """What was counted, without the empty bins at either end; bin 0 is always there."""
        used = np.flatnonzero(self._counts)
        first, last = (min(int(used[0]), BINS), max(int(used[-1]), BINS)) if used.size else (BINS, BINS)
        return Histogram(self._counts[first : last + 1].copy(), first - BINS, 2.0**self._grown)
