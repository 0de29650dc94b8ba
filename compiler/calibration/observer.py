"""Accumulates the statistics of one tensor, reading after reading."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .histogram import Growing
from .reductions import HUGE, Reading
from .statistics import TensorStatistics


class Observer:
    """The statistics of one tensor, from the readings of batches.

    Args:
        axis: of the channels; None where there are none.
        momentum: weight of a new batch in the moving average of the extremes.
    """

    def __init__(self, axis: int | None, momentum: float) -> None:
        self._axis = axis
        self._momentum = momentum
        self._channels: _Channels | None = None
        self._count = self._masked = 0
        self._low, self._high = np.inf, -np.inf
        self._average = (0.0, 0.0)
        self._elements: _Elements | None = None

    def add(self, reading: Reading) -> None:
        """Takes in a batch."""
        if not reading.size:
            return
        self._count += reading.size
        self._masked += reading.masked
        low, high = float(reading.low.min()), float(reading.high.max())
        if low > high:  # nothing is finite
            return
        old_low, old_high = self._average if self._low <= self._high else (low, high)
        self._average = old_low + self._momentum * (low - old_low), old_high + self._momentum * (high - old_high)
        self._low, self._high = min(self._low, low), max(self._high, high)
        self._add_channels(reading)
        if self._elements is None and reading.elements is not None:
            self._elements = _Elements()
        if self._elements is not None:
            self._elements.add(reading)

    def _add_channels(self, reading: Reading) -> None:
        if reading.masked or len(reading.low) < 2:
            self._axis = None
        if self._axis is None:
            return
        self._channels = self._channels or _Channels(len(reading.low))
        if len(self._channels.low) == len(reading.low):
            self._channels.add(reading)
        else:  # it is not channels that this axis counts
            self._axis = None

    def result(self) -> TensorStatistics | None:
        """None where no finite value was seen."""
        if self._low > self._high:
            return None
        found = TensorStatistics(self._count, self._masked, self._low, self._high, *self._average)
        if self._elements is not None:
            found = dataclasses.replace(found, **self._elements.result())
        if self._axis is None or self._channels is None:
            return found
        return dataclasses.replace(found, channel_axis=self._axis, **self._channels.result())


class _Channels:
    """Extremes and means by channel; a batch with means stands for those before it without."""

    def __init__(self, count: int) -> None:
        self.low = np.full(count, np.inf)
        self._high = np.full(count, -np.inf)
        self._sum = np.zeros(count)
        self._size = self._waiting = 0

    def add(self, reading: Reading) -> None:
        self.low = np.minimum(self.low, reading.low)
        self._high = np.maximum(self._high, reading.high)
        self._waiting += reading.size
        if reading.mean is not None:
            self._sum += self._waiting * reading.mean.astype(np.float64)
            self._size += self._waiting
            self._waiting = 0

    def result(self) -> dict[str, Any]:
        mean = self._sum / self._size if self._size else None
        return {"channel_low": self.low, "channel_high": self._high, "channel_mean": mean}


class _Elements:
    """Counts by value and by exponent, and sums, of the elements that are given; each stands for several.

    Those of a batch stand for the batches before it that gave none, and at the end all stand for those that follow.
    """

    def __init__(self) -> None:
        self._histogram = Growing()
        self._exponents = np.zeros(256)
        self._smallest = np.inf
        self._zeros = self._squares = self._weight = 0.0
        self._size = self._waiting = 0

    def add(self, reading: Reading) -> None:
        self._size += reading.size
        self._waiting += reading.size
        if reading.elements is None:
            return
        elements = np.ascontiguousarray(reading.elements)
        weight = self._waiting / elements.size
        self._waiting = 0
        if reading.masked:
            elements = elements[np.abs(elements) <= HUGE]
        if not elements.size:
            return
        counts = np.bincount((elements.view(np.int32) >> 23) & 0xFF, minlength=256)
        self._histogram.add(elements, weight)
        self._exponents += weight * counts
        self._squares += weight * _squares(elements)
        self._weight += weight * elements.size
        zeros = elements.size - int(np.count_nonzero(elements))
        self._zeros += weight * zeros
        lowest = int(np.argmax(counts[1:] > 0)) + 1
        if counts[0] > zeros or 2.0 ** (lowest - 127) < self._smallest:  # may hold a smaller one: a slow look
            sizes = np.abs(elements[elements != 0])
            self._smallest = min(self._smallest, float(sizes.min(initial=np.inf)))

    def result(self) -> dict[str, Any]:
        histogram, more = self._histogram.result(), self._size / (self._size - self._waiting)
        return {
            "histogram": dataclasses.replace(histogram, counts=more * histogram.counts),
            "exponents": more * self._exponents,
            "zeros": more * self._zeros,
            "smallest": self._smallest,
            "rms": math.sqrt(self._squares / self._weight) if self._weight else 0.0,
        }


def _squares(elements: np.ndarray) -> float:
    total = float(elements @ elements)
    return total if np.isfinite(total) else float(elements.astype(np.float64) @ elements)
