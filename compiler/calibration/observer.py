"""Accumulates the statistics of one tensor, batch after batch."""

from __future__ import annotations

import dataclasses
import math
import zlib

import numpy as np

from .histogram import Growing
from .statistics import TensorStatistics

HUGE = 1e30
"""Beyond this a value stands for infinity."""

SAMPLED = 8192
"""How many elements of a tensor go into its histogram for each sample of the batch."""

_BLOCK_BYTES = 1 << 19  # what stays in a core's cache from one reduction to the next
_MOST_CHANNELS = 1 << 16


class Observer:
    """The statistics of one tensor.

    Args:
        name: decides with `seed` which elements are sampled.
        axis: of the channels; None for the range alone.
        full: collect everything, not the range alone.
    """

    def __init__(self, name: str, axis: int, *, full: bool, seed: int, momentum: float) -> None:
        self._axis: int | None = axis if full else None
        self._full = full
        self._momentum = momentum
        self._random = np.random.default_rng((seed, zlib.crc32(name.encode())))
        self._histogram = Growing()
        self._exponents = np.zeros(256)
        self._channels: _Channels | None = None
        self._count = self._masked = 0
        self._low = self._batch_low = np.inf
        self._high = self._batch_high = -np.inf
        self._average: tuple[float, float] | None = None
        self._smallest = np.inf
        self._zeros = self._squares = self._weight = 0.0

    def add(self, array: np.ndarray, samples: int) -> None:
        """Takes in the tensor of a batch, or of a part of one, that holds this many samples."""
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array, np.float32)
        if not array.size:
            return
        self._count += array.size
        low, high = self._extremes(array)
        if not (low >= -HUGE and high <= HUGE):  # NaN too
            array, low, high = self._unmasked(array)
        self._batch_low, self._batch_high = min(self._batch_low, low), max(self._batch_high, high)
        if self._full and array.size:
            self._sample(array.reshape(-1), SAMPLED * max(samples, 1))

    def end_batch(self) -> None:
        """Takes the extremes since the last call into the moving average."""
        low, high = self._batch_low, self._batch_high
        self._batch_low, self._batch_high = np.inf, -np.inf
        if low > high:
            return
        self._low, self._high = min(self._low, low), max(self._high, high)
        old_low, old_high = self._average or (low, high)
        self._average = old_low + self._momentum * (low - old_low), old_high + self._momentum * (high - old_high)

    def _extremes(self, array: np.ndarray) -> tuple[float, float]:
        channels = self._of_channels(array)
        if channels is None:
            return float(array.min()), float(array.max())
        low, high = channels.add(array)
        return float(low), float(high)

    def _of_channels(self, array: np.ndarray) -> _Channels | None:
        if self._axis is None:
            return None
        if not -array.ndim <= self._axis < array.ndim or array.shape[self._axis] > _MOST_CHANNELS:
            self._axis = self._channels = None
            return None
        count = array.shape[self._axis]
        if self._channels is None:
            self._channels = _Channels(self._axis, count)
        elif self._channels.count != count:
            self._axis = self._channels = None
        return self._channels

    def _unmasked(self, array: np.ndarray) -> tuple[np.ndarray, float, float]:
        self._axis = self._channels = None
        finite = array[np.isfinite(array)]
        kept = finite[np.abs(finite) <= HUGE]
        self._masked += array.size - kept.size
        return kept, float(finite.min(initial=np.inf)), float(finite.max(initial=-np.inf))

    def _sample(self, flat: np.ndarray, most: int) -> None:
        size = flat.size
        if size > most:
            stride = -(-size // most)
            while math.gcd(stride, size) > 1:  # else only some columns of an image are met
                stride += 1
            flat = np.ascontiguousarray(flat[self._random.integers(stride) :: stride])
        weight = size / flat.size
        self._histogram.add(flat, weight)
        bits = flat.view(np.int32) & 0x7FFFFFFF
        self._exponents += weight * np.bincount(bits >> 23, minlength=256)
        self._squares += weight * float(np.dot(flat, flat))
        self._weight += weight * flat.size
        smallest = int(np.min(bits - 1, where=bits > 0, initial=0x7F7FFFFF)) + 1
        self._zeros += weight * (flat.size - int(np.count_nonzero(bits)))
        if smallest < 0x7F800000:
            self._smallest = min(self._smallest, float(np.int32(smallest).view(np.float32)))

    def result(self) -> TensorStatistics | None:
        """None where no finite value was seen."""
        if self._average is None:
            return None
        base = TensorStatistics(self._count, self._masked, self._low, self._high, *self._average)
        if not self._full:
            return base
        channels = self._channels
        return dataclasses.replace(
            base,
            histogram=self._histogram.result(),
            exponents=self._exponents,
            zeros=self._zeros,
            smallest=self._smallest,
            rms=math.sqrt(self._squares / self._weight) if self._weight else 0.0,
            channel_axis=self._axis if channels else None,
            channel_low=channels.low.astype(np.float64) if channels else None,
            channel_high=channels.high.astype(np.float64) if channels else None,
            channel_mean=channels.sum / max(channels.elements, 1) if channels else None,
        )


class _Channels:
    """Extremes and sums by channel."""

    def __init__(self, axis: int, count: int) -> None:
        self._axis = axis
        self.count = count
        self.low = np.full(count, np.inf, np.float32)
        self.high = np.full(count, -np.inf, np.float32)
        self.sum = np.zeros(count)
        self.elements = 0

    def add(self, array: np.ndarray) -> tuple[np.floating, np.floating]:
        """Takes in an array; gives its extremes, NaN where it has any."""
        axis = self._axis % array.ndim
        inner = math.prod(array.shape[axis + 1 :])
        self.elements += array.size // self.count
        if inner == 1:
            return self._add_rows(array.reshape(-1, self.count))
        low, high = np.float32(np.inf), np.float32(-np.inf)
        step = max(1, _BLOCK_BYTES // (4 * inner))
        for image in array.reshape(-1, self.count, inner):
            for start in range(0, self.count, step):
                rows = slice(start, start + step)
                block = image[rows]
                lows, highs = self._merge(rows, block.min(1), block.max(1), block.sum(1))
                low, high = np.minimum(low, lows), np.maximum(high, highs)
        return low, high

    def _add_rows(self, array: np.ndarray) -> tuple[np.floating, np.floating]:
        low, high = np.float32(np.inf), np.float32(-np.inf)
        step = max(1, _BLOCK_BYTES // (4 * self.count))
        everything = slice(None)
        for start in range(0, len(array), step):
            block = array[start : start + step]
            lows, highs = self._merge(everything, block.min(0), block.max(0), block.sum(0, dtype=np.float64))
            low, high = np.minimum(low, lows), np.maximum(high, highs)
        return low, high

    def _merge(
        self, rows: slice, low: np.ndarray, high: np.ndarray, total: np.ndarray
    ) -> tuple[np.floating, np.floating]:
        np.minimum(self.low[rows], low, out=self.low[rows])
        np.maximum(self.high[rows], high, out=self.high[rows])
        self.sum[rows] += total
        return low.min(), high.max()
