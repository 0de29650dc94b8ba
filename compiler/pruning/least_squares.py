"""Least squares from sums over rows, so that the rows need not be kept."""

from __future__ import annotations

import dataclasses

import numpy as np

_DAMPINGS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
"""Parts of the mean of the diagonal of second moments."""

_TINY = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Solved:
    """Weights (out, n) and shift (out,), with squared errors on rows that were held out, and what these vary by."""

    weight: np.ndarray
    shift: np.ndarray
    before: float
    after: float
    energy: float


class Moments:
    """Sums over rows of inputs x (n,) and outputs y (out,)."""

    def __init__(self, length: int, out: int) -> None:
        self._count = 0
        self._x, self._y = np.zeros(length), np.zeros(out)
        self._xx, self._yx = np.zeros((length, length)), np.zeros((out, length))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Takes rows (rows, n) and (rows, out)."""
        self._count += len(x)
        self._x += x.sum(axis=0)
        self._y += y.sum(axis=0)
        self._xx += x.T @ x
        self._yx += y.T @ x

    def solve(self, old: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, *, shifts: bool) -> Solved:
        """Weights (out, n) and, where the layer can have one, a shift (out,): the best on rows that are held out."""
        count = max(self._count, 1)
        mean_x, mean_y = self._x / count * shifts, self._y / count * shifts
        moment = self._xx - count * np.outer(mean_x, mean_x)
        cross = self._yx - count * np.outer(mean_y, mean_x) - old @ moment
        scale = max(float(np.diag(moment).mean()), _TINY)
        candidates = [(old, np.zeros(len(old))), (old, mean_y - old @ mean_x)]
        for damping in _DAMPINGS:
            weight = old + np.linalg.solve(moment + damping * scale * np.eye(len(moment)), cross.T).T
            candidates.append((weight, mean_y - weight @ mean_x))
        errors = [float(np.square(test_y - test_x @ weight.T - shift).sum()) for weight, shift in candidates]
        best = int(np.argmin(errors))
        weight, shift = candidates[best]
        energy = max(float(np.square(test_y - test_y.mean(axis=0)).sum()), _TINY)
        return Solved(weight.astype(np.float32), shift.astype(np.float32), errors[0], errors[best], energy)
