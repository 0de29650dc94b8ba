"""Weights in blocks along their inputs, 4 or 8 bits each with a scale of its own: numbers, search and packing.

    real = (code - zero point) * scale        code 0 .. 2^bits - 1, zero point 2^(bits - 1) where symmetric

Codes are not symmetric around the zero point (-8 .. 7), so a symmetric scale takes the sign that gives the largest
magnitude of its block the longer side, where the runtime takes negative scales.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .rounding import gptq

_ROWS = 1 << 16
"""Blocks that are searched at once, which bounds memory."""
_SHRINKS = {4: np.linspace(1.05, 0.6, 16), 8: np.linspace(1.01, 0.98, 4)}
"""Parts of the range that a block's scale may cover: clipping a little costs less than coarse steps."""


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """A weight (K, N) in blocks of rows.

    Attributes:
        codes: uint8 (N, blocks, size); rows beyond K hold the zero point.
        scale: float32 (N, blocks), never zero.
        zero_point: uint8 (N, blocks); None where it is 2^(bits - 1) throughout.
        rows: K.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    bits: int
    rows: int

    def signed(self) -> np.ndarray:
        """Codes less their zero points, int16 (N, blocks, size)."""
        zero = np.int16(1 << (self.bits - 1)) if self.zero_point is None else self.zero_point[..., None]
        return self.codes.astype(np.int16) - zero

    def real(self) -> np.ndarray:
        """The weight that is left, float32 (K, N)."""
        blocks = self.signed() * self.scale[..., None]
        matrix: np.ndarray = blocks.reshape(len(blocks), -1)[:, : self.rows].T
        return matrix

    def packed(self) -> np.ndarray:
        """The codes for MatMulNBits, uint8 (N, blocks, size * bits / 8); of two in a byte the first is low."""
        return pack(self.codes, self.bits)

    def packed_zero_point(self) -> np.ndarray | None:
        """Zero points as MatMulNBits takes them, uint8 (N, blocks * bits / 8 rounded up)."""
        return None if self.zero_point is None else pack(self.zero_point, self.bits)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Puts codes of 4 bits into bytes along the last axis, filled up with zero; those of 8 bits stay."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    return np.asarray(codes[..., ::2] | codes[..., 1::2] << 4, np.uint8)


def quantize(
    weight: np.ndarray,
    bits: int,
    size: int,
    *,
    symmetric: bool = True,
    signed_scale: bool = True,
    importance: np.ndarray | None = None,
) -> Blocks:
    """Rounds a weight (K, N) to nearest, each block with the scale of the least squared error among those tried.

    Args:
        symmetric: one zero point for all; else one for each block.
        signed_scale: symmetric scales may be negative.
        importance: (K,) what a squared error of each row costs, for instance the mean square of the input that it is
            multiplied with.
    """
    rows, columns = weight.shape
    padding = -rows % size
    blocks = np.pad(weight.T.astype(np.float32), [(0, 0), (0, padding)]).reshape(columns, -1, size)
    costs = np.ones(rows, np.float32) if importance is None else importance.astype(np.float32)
    costs = np.pad(costs, (0, padding)).reshape(-1, size)
    costs = costs / np.maximum(costs.mean(), np.finfo(np.float32).tiny) + np.float32(1e-6)
    codes = np.empty(blocks.shape, np.uint8)
    scale = np.empty(blocks.shape[:2], np.float32)
    zero = np.empty(blocks.shape[:2], np.uint8)
    step = max(1, _ROWS // blocks.shape[1])
    for start in range(0, columns, step):
        part = slice(start, start + step)
        found = _symmetric(blocks[part], costs, bits, signed_scale) if symmetric else _affine(blocks[part], costs, bits)
        codes[part], scale[part], zero[part] = found
    return Blocks(codes, scale, None if symmetric else zero, bits, rows)


def compensate(blocks: Blocks, weight: np.ndarray, hessian: np.ndarray) -> Blocks:
    """Rounds the weight (K, N) anew by GPTQ, with the scales and zero points that it has; see `rounding`.

    A column that is no better for it stays as it is.

    Args:
        hessian: (K, K), the sum of x x^T over inputs x of the data.
    """
    size, rows = blocks.codes.shape[-1], blocks.rows
    scale = np.repeat(blocks.scale, size, axis=1)[:, :rows]
    half = np.full(blocks.scale.shape, 1 << (blocks.bits - 1), np.uint8)
    zero = np.repeat(half if blocks.zero_point is None else blocks.zero_point, size, axis=1)[:, :rows].astype(np.int32)
    matrix = weight.T.astype(np.float32)
    found = gptq(matrix, hessian, scale, (-zero, (1 << blocks.bits) - 1 - zero))
    errors = [((left @ hessian) * left).sum(axis=1) for left in (matrix - found * scale, matrix - blocks.real().T)]
    better = errors[0] < errors[1]
    codes = blocks.codes.reshape(len(matrix), -1).copy()
    codes[better, :rows] = (found + zero)[better].astype(np.uint8)
    return dataclasses.replace(blocks, codes=codes.reshape(blocks.codes.shape))


_Found = tuple[np.ndarray, np.ndarray, np.ndarray]


def _symmetric(blocks: np.ndarray, costs: np.ndarray, bits: int, signed_scale: bool) -> _Found:
    half = 1 << (bits - 1)
    high, low = blocks.max(axis=-1), blocks.min(axis=-1)
    peak = np.maximum(high, -low)
    widest = np.where(high > -low, -peak, peak) / half if signed_scale else peak / (half - 1)
    zero = np.full(peak.shape, half, np.uint8)
    return _best(blocks, costs, bits, [(widest * shrink, zero) for shrink in _SHRINKS[bits]])


def _affine(blocks: np.ndarray, costs: np.ndarray, bits: int) -> _Found:
    largest = (1 << bits) - 1
    high, low = np.maximum(blocks.max(axis=-1), 0), np.minimum(blocks.min(axis=-1), 0)
    tries = []
    for shrink in _SHRINKS[bits]:
        scale = (high - low) * (shrink / largest)
        zero = np.rint(-low * shrink / _nonzero(scale)).clip(0, largest).astype(np.uint8)
        tries.append((scale, zero))
    return _best(blocks, costs, bits, tries)


def _best(blocks: np.ndarray, costs: np.ndarray, bits: int, tries: list[tuple[np.ndarray, np.ndarray]]) -> _Found:
    """For each block the try of the least error, its scale fitted to the codes by least squares."""
    error = np.full(blocks.shape[:2], np.inf, np.float32)
    codes = np.empty(blocks.shape, np.uint8)
    scale, zero = np.ones(error.shape, np.float32), tries[0][1].copy()
    largest = (1 << bits) - 1
    for tried, tried_zero in tries:
        offset = tried_zero[..., None].astype(np.float32)
        numbers = np.rint(blocks / _nonzero(tried)[..., None])
        np.clip(numbers, -offset, largest - offset, out=numbers)
        weighted = numbers * costs
        fitted = (weighted * blocks).sum(axis=-1) / np.maximum((weighted * numbers).sum(axis=-1), 1e-30)
        fitted = np.where(fitted * tried > 0, fitted, tried).astype(np.float32)
        found = (((numbers * fitted[..., None] - blocks) ** 2) * costs).sum(axis=-1)
        better = found < error
        error[better], scale[better], zero[better] = found[better], fitted[better], tried_zero[better]
        codes[better] = (numbers[better] + offset[better]).astype(np.uint8)
    return codes, _nonzero(scale), zero


def _nonzero(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, np.float32(1), scale).astype(np.float32)
