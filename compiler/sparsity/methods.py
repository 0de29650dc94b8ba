"""Which two of each four weights stay, and what they become.

    magnitude    the largest |W|
    wanda        the largest |W| ||x||, x the input over the data (Sun et al. 2023, "A Simple and Effective Pruning
                 Approach for Large Language Models")
    sparsegpt    the largest W^2 / [H^-1]_ii, and those not settled yet make up for the error (Frantar and Alistarh
                 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot")

The Hessian H = sum x x^T over the data also tells the error that each of them makes: tr(D H D^T) for a change D of the
weights, so that the best one can be taken without running anything.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import numpy as np

from ..quantization.compensation import compensated, factored, squared_error
from .pattern import GROUP, columns, strongest

Method = Literal["sparsegpt", "wanda", "magnitude"]

METHODS: tuple[Method, ...] = ("sparsegpt", "wanda", "magnitude")
"""The one that is taken where two make the same error comes first."""

_UNSEEN = 1e-6
"""What an input that the data never used counts, of the mean one: its weights go first, and by their magnitude."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sparse:
    """A weight in the pattern.

    Attributes:
        weight: (out, in, *kernel).
        weight_error: relative L2 of the weight against the dense one.
        output_error: relative L2 of the layer's products over the data; None without data.
    """

    weight: np.ndarray
    method: Method
    weight_error: float
    output_error: float | None


def sparsified(weight: np.ndarray, hessian: np.ndarray | None, methods: Iterable[Method]) -> Sparse:
    """The weight by the method that makes the least error on the data; without data that is by magnitude.

    Args:
        weight: (out, in, *kernel), `in` a multiple of four.
        hessian: (n, n) of what the layer reads, n = in x kernel ordered as the weight; None without data.
        methods: those to choose from.
    """
    order = columns(weight.shape[1], math.prod(weight.shape[2:]))
    rows = weight.reshape(len(weight), -1)[:, order]
    found: list[Sparse] = []
    moments = None if hessian is None else np.asarray(hessian[np.ix_(order, order)])
    for method in methods if moments is not None else (METHODS[-1],):
        result = _by(method, rows, moments)
        natural = np.empty_like(rows)
        natural[:, order] = result
        lost = None if moments is None else _relative(squared_error(rows - result, moments), rows, moments)
        change = float(np.linalg.norm(rows - result) / np.linalg.norm(rows))
        found.append(Sparse(natural.reshape(weight.shape), method, change, lost))
    return min(found, key=lambda one: one.output_error or 0.0)


def _by(method: Method, rows: np.ndarray, hessian: np.ndarray | None) -> np.ndarray:
    if hessian is None or method == "magnitude":
        return np.where(strongest(np.abs(rows)), rows, 0)
    if method == "wanda":
        return np.where(strongest(np.square(rows) * _seen(hessian)), rows, 0)
    return _sparsegpt(rows, hessian)


def _sparsegpt(rows: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Groups with the largest second moments come first, while there is still much to make up with."""
    moments = np.diag(hessian).reshape(-1, GROUP)
    groups = np.argsort(-moments.sum(axis=1), kind="stable")
    order = (groups[:, None] * GROUP + np.arange(GROUP)).reshape(-1)
    factor = factored(hessian[np.ix_(order, order)])
    weighting = np.where(np.diag(hessian)[order] > 0, 1, _UNSEEN) / np.square(np.diag(factor))
    kept = np.empty(rows.shape, bool)

    def settle(i: int, left: np.ndarray) -> np.ndarray:
        if i % GROUP == 0:
            kept[:, i : i + GROUP] = strongest(np.square(left[:, :GROUP]) * weighting[i : i + GROUP])
        return np.where(kept[:, i], left[:, 0], 0)

    result = np.empty_like(rows)
    result[:, order] = compensated(rows[:, order], factor, settle)
    return result


def _seen(hessian: np.ndarray) -> np.ndarray:
    """Squared length of each input over the data."""
    moments = np.diag(hessian)
    return np.asarray(moments + _UNSEEN * moments.mean() if moments.any() else np.ones_like(moments))


def _relative(lost: np.ndarray, rows: np.ndarray, hessian: np.ndarray) -> float | None:
    whole = float(squared_error(rows, hessian).sum())
    return math.sqrt(max(float(lost.sum()), 0.0) / whole) if whole > 0 else None
