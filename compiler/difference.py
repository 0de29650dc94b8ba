"""How far two runs of the same thing are apart, for steps that must change nothing. Verdicts on engines: validation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    """||found - expected|| / ||expected||, infinite where shapes, dtypes, NaN, Inf or, of other dtypes, values differ.

    An array of zeros has no norm to compare with: 1e-6 an element stands in for it.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if expected.dtype.kind not in "fcV" and "float" not in expected.dtype.name:
        return 0.0 if np.array_equal(found, expected) else float("inf")
    kind = np.complex128 if expected.dtype.kind == "c" else np.float64
    a, b = found.astype(kind).ravel(), expected.astype(kind).ravel()
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
        return float("inf")
    error, norm = float(np.linalg.norm(a[finite] - b[finite])), float(np.linalg.norm(b[finite]))
    return error / max(norm, 1e-6 * float(np.sqrt(max(b.size, 1))))


def worst_relative_l2(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """The largest `relative_l2` of any output."""
    return max((relative_l2(found[name], array) for name, array in expected.items()), default=0.0)
