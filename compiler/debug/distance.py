"""How far a tensor is from what it should be."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from ..validation.metrics import compare


@dataclasses.dataclass(frozen=True)
class Distance:
    """Of a tensor to the same tensor of the reference. What does not exist is None.

    Attributes:
        relative_l2: ||y - r|| / ||r||.
        max_abs: max|y - r|, in the tensor's own unit.
        nan: places where the tensor has NaN and the reference has not; `inf` likewise.
        problem: what else is wrong, in a sentence.
    """

    relative_l2: float | None
    snr_db: float | None
    max_abs: float | None
    nan: int = 0
    inf: int = 0
    problem: str = ""

    @property
    def size(self) -> float:
        """One number to compare with a threshold; infinite for a NaN or Inf that should not be there."""
        if self.nan or self.inf or self.problem:
            return math.inf
        size = self.relative_l2 or 0.0
        return math.inf if math.isnan(size) else size


def distance(reference: np.ndarray, found: np.ndarray) -> Distance | None:
    """The distance; None where there is none, between other shapes or of a reference without finite values."""
    if reference.shape != found.shape or not reference.size or reference.dtype.kind in "OSU":
        return None
    r, y = reference.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(r)
    if not finite.any():
        return None
    difference = compare(r, y)
    with np.errstate(invalid="ignore", over="ignore"):
        furthest = float(np.abs(y[finite] - r[finite]).max())
    return Distance(
        relative_l2=_finite(difference.relative_l2),
        snr_db=_finite(difference.snr_db),
        max_abs=_finite(furthest),
        nan=difference.nan,
        inf=difference.inf,
        problem=difference.problem,
    )


def worst(distances: list[Distance | None]) -> float:
    """The largest of the sizes; 0 where there is none."""
    return max((found.size for found in distances if found is not None), default=0.0)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
