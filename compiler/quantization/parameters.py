"""What numbers an integer or 8-bit float stands for: ``real = (quantized - zero_point) * scale``."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import onnx_ir as ir

BIAS_LARGEST = 2**30
"""An int32 bias keeps half of its range free for the products that are added to it."""

_TINY = float(np.finfo(np.float32).tiny)
_RATIOS = np.linspace(1.0, 0.4, 49)
"""Which parts of a channel's largest magnitude are tried as its limit."""

_BLOCK = 1 << 21
"""Elements of a weight that are searched at once, which bounds memory."""


@dataclasses.dataclass(frozen=True, eq=False)
class Parameters:
    """Scale and zero point of one tensor.

    Attributes:
        scale: float32, shape () for the whole tensor or (channels,) along `axis`; never zero, subnormal or infinite.
        zero_point: shape of `scale`; its dtype is the dtype of the quantized tensor.
        axis: axis of the channels; None where one scale serves the whole tensor.
        limit: the largest magnitude of a quantized number, where that is less than its type allows.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None = None
    limit: int | None = None

    @property
    def dtype(self) -> ir.DataType:
        """Type of the quantized tensor."""
        return ir.DataType.from_numpy(self.zero_point.dtype)

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest quantized number."""
        return _bounds(self.dtype) if self.limit is None else (-self.limit, self.limit)

    @property
    def low(self) -> np.ndarray:
        """Smallest real number that can be told, shape of `scale`."""
        return np.asarray((self.bounds[0] - self.zero_point.astype(np.float32)) * self.scale)

    @property
    def high(self) -> np.ndarray:
        """Largest real number that can be told, shape of `scale`."""
        return np.asarray((self.bounds[1] - self.zero_point.astype(np.float32)) * self.scale)

    def quantize(self, array: np.ndarray) -> np.ndarray:
        """Rounds to nearest even and saturates, as QuantizeLinear does."""
        scale, zero_point = self.along(self.scale, array.ndim), self.along(self.zero_point, array.ndim)
        if self.dtype == ir.DataType.FLOAT8E4M3FN:
            return np.asarray(np.clip(array / scale, *self.bounds).astype(self.zero_point.dtype))
        if self.dtype == ir.DataType.INT32:  # float32 does not tell integers above 2**24 apart
            array, scale = array.astype(np.float64), scale.astype(np.float64)
        rounded = np.rint(array / scale) + zero_point
        return np.asarray(np.clip(rounded, *self.bounds).astype(self.zero_point.dtype))

    def dequantize(self, quantized: np.ndarray) -> np.ndarray:
        """The real numbers as float32."""
        scale, zero_point = self.along(self.scale, quantized.ndim), self.along(self.zero_point, quantized.ndim)
        wide = np.float64 if self.dtype == ir.DataType.INT32 else np.float32
        return np.asarray(((quantized.astype(wide) - zero_point.astype(wide)) * scale).astype(np.float32))

    def round(self, array: np.ndarray) -> np.ndarray:
        """What is left of an array after quantizing and dequantizing."""
        return self.dequantize(self.quantize(array))

    def along(self, numbers: np.ndarray, rank: int) -> np.ndarray:
        """Numbers of the shape of `scale`, shaped to go with a tensor of this rank."""
        if self.axis is None:
            return numbers
        shape = [1] * rank
        shape[self.axis] = -1
        return numbers.reshape(shape)


def activation_parameters(low: float, high: float, dtype: ir.DataType, *, symmetric: bool) -> Parameters:
    """Parameters for an activation that lies in ``low .. high``; the range is widened to hold zero.

    A tensor that is always zero gets the range 0 .. 1, so that its scale is not zero.

    Raises:
        ValueError: a limit is not finite, or low is above high.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"{low} .. {high} is no range")
    low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 255 * _TINY:
        low, high = 0.0, 1.0
    smallest, largest = _bounds(dtype)
    if symmetric:
        zero = 128 if dtype == ir.DataType.UINT8 else 0
        scale = np.float32(max(-low, high) / (largest - zero))
    else:
        scale = np.float32((high - low) / (largest - smallest))
        zero = round(smallest - low / float(scale))
    if zero == smallest and scale * np.float32(largest - smallest) > np.float32(high):
        scale = np.nextafter(scale, np.float32(0))  # 255 * (6 / 255) > 6, and a Clip at 6 would not be redundant
    return Parameters(np.array(scale), np.array(zero).astype(dtype.numpy()))


def weight_parameters(
    array: np.ndarray,
    axis: int | None,
    dtype: ir.DataType,
    *,
    search: bool = False,
    importance: np.ndarray | None = None,
    reduce_range: bool = False,
) -> Parameters:
    """Symmetric parameters for a constant: by its largest magnitude, or by least squares.

    Channels that are all zero get the scale of a typical channel, because a bias is stored in multiples of it.

    Args:
        axis: the axis of output channels; None for one scale.
        search: try to clip each channel, and take the limit of the least squared error; integers only.
        importance: what a squared error costs, of a shape that broadcasts to the array's, for instance the mean square
            of what is multiplied with an element; for `search`.
        reduce_range: use 7 of 8 bits, as processors without VNNI need, which add two products in 16 bits.

    Raises:
        ValueError: the array holds NaN or Inf.
    """
    largest = 64 if reduce_range else 448 if dtype == ir.DataType.FLOAT8E4M3FN else 127
    rows = _rows(array, axis)
    peaks = np.abs(rows).max(axis=1, initial=0).astype(np.float64)
    if not np.isfinite(peaks).all():
        raise ValueError("it holds NaN or Inf")
    if search and dtype != ir.DataType.FLOAT8E4M3FN and rows.shape[1]:
        costs = None if importance is None else _rows(np.broadcast_to(importance, array.shape), axis)
        peaks *= _best_ratios(rows, costs, peaks, largest)
    scale = np.maximum(_filled(peaks) / largest, _TINY).astype(np.float32)
    scale = scale[0] if axis is None else scale
    return Parameters(np.array(scale), np.zeros(scale.shape, dtype.numpy()), axis, limit=largest)


def bias_parameters(input_scale: np.ndarray, weight: Parameters) -> Parameters:
    """Parameters of the int32 bias (channels,) that integer kernels add: scale of the input times the weight's."""
    scale = np.maximum(input_scale.astype(np.float64) * weight.scale, _TINY).astype(np.float32)
    return Parameters(scale, np.zeros(scale.shape, np.int32), None if weight.axis is None else 0)


def widened_for_bias(weight: Parameters, bias: np.ndarray, input_scale: np.ndarray) -> Parameters:
    """The weight's parameters, with scales raised where the bias (channels,) would overflow int32; else the same."""
    least = np.abs(bias.astype(np.float64)) / (float(input_scale) * BIAS_LARGEST)
    least = np.asarray(least.max(initial=0) if weight.axis is None else least)
    if (weight.scale >= least).all():
        return weight
    raised = np.nextafter(least.astype(np.float32), np.float32(np.inf))
    return dataclasses.replace(weight, scale=np.maximum(weight.scale, raised))


@functools.cache
def _bounds(dtype: ir.DataType) -> tuple[int, int]:
    bounds = {
        ir.DataType.UINT8: (0, 255),
        ir.DataType.INT8: (-128, 127),
        ir.DataType.INT32: (-(2**31), 2**31 - 1),
        ir.DataType.FLOAT8E4M3FN: (-448, 448),
    }
    return bounds[dtype]


def _rows(array: np.ndarray, axis: int | None) -> np.ndarray:
    """The array as (channels, elements)."""
    if axis is None:
        return array.reshape(1, -1)
    return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)


def _filled(peaks: np.ndarray) -> np.ndarray:
    """Channels without a magnitude take the median of the others; 1 where there is none."""
    alive = peaks[peaks > 0]
    return np.where(peaks > 0, peaks, np.median(alive) if alive.size else 1.0)


def _best_ratios(rows: np.ndarray, costs: np.ndarray | None, peaks: np.ndarray, largest: int) -> np.ndarray:
    """For each channel the part of its peak that clips at the least squared error."""
    best = np.ones(len(rows))
    step = max(1, _BLOCK // rows.shape[1])
    for start in range(0, len(rows), step):
        chosen = slice(start, start + step)
        cost = None if costs is None else costs[chosen]
        errors = [_squared_error(rows[chosen], cost, _filled(peaks[chosen]) * r / largest, largest) for r in _RATIOS]
        best[chosen] = _RATIOS[np.argmin(errors, axis=0)]
    return best


def _squared_error(rows: np.ndarray, costs: np.ndarray | None, scale: np.ndarray, largest: int) -> np.ndarray:
    narrow = scale.astype(np.float32)[:, None]
    error = np.clip(np.rint(rows / narrow), -largest, largest) * narrow - rows
    error *= error
    total: np.ndarray = error.sum(axis=1) if costs is None else (error * costs).sum(axis=1)
    return total
