"""Settles the weights of a layer one input after the other, those not settled yet making up for the error.

Optimal Brain Surgeon in the form of GPTQ and SparseGPT (Frantar et al. 2022 and 2023): with H = sum x x^T and
H^-1 = U^T U, settling input i at an error e moves the weights of the inputs behind it by -e U[i, i+1:] / U[i, i].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

DAMPING = 0.01
"""Part of the mean of the Hessian's diagonal that is added to it."""

BLOCK = 128
"""Inputs whose errors are carried to the inputs behind them in one product; a multiple of every group of inputs."""


def compensated(weight: np.ndarray, factor: np.ndarray, settle: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
    """The settled weights (out, in), float32.

    Args:
        weight: (out, in), in the order in which inputs are settled.
        factor: the upper factor of the inverse Hessian in the same order, see `factored`.
        settle: takes the number of an input and the weights from that input on, as they are by then, and gives the
            numbers (out,) that the input's weights become.
    """
    left = weight.astype(np.float32)
    settled = np.empty_like(left)
    for start in range(0, left.shape[1], BLOCK):
        stop = min(start + BLOCK, left.shape[1])
        errors = np.empty((len(left), stop - start), np.float32)
        for i in range(start, stop):
            settled[:, i] = settle(i, left[:, i:])
            errors[:, i - start] = (left[:, i] - settled[:, i]) / factor[i, i]
            left[:, i + 1 : stop] -= np.outer(errors[:, i - start], factor[i, i + 1 : stop])
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return settled


def squared_error(difference: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Squared error on the data of each output, for weights that differ by `difference` (out, in)."""
    return np.asarray(((difference @ hessian) * difference).sum(axis=1))


def factored(hessian: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """The upper Cholesky factor U of the inverse, H^-1 = U^T U; an input that the data never used is a mean one."""
    damped = hessian.astype(np.float64)
    diagonal = np.diag(damped).copy()
    dead = diagonal <= 0
    live_mean = diagonal[~dead].mean() if not dead.all() else 1.0
    damped[dead, dead] = live_mean
    damped[np.diag_indices_from(damped)] += damping * live_mean
    # With J reversing rows and columns, J H J = L L^T gives H^-1 = U^T U for U = J L^-1 J.
    return np.asarray(_inverse(np.linalg.cholesky(damped[::-1, ::-1]))[::-1, ::-1], np.float32)


def _inverse(lower: np.ndarray) -> np.ndarray:
    """The inverse of a lower triangular matrix, in a third of the time of a general one."""
    if len(lower) <= BLOCK:
        return np.linalg.inv(lower)
    half = len(lower) // 2
    result = np.zeros_like(lower)
    result[:half, :half] = first = _inverse(lower[:half, :half])
    result[half:, half:] = second = _inverse(lower[half:, half:])
    result[half:, :half] = -second @ (lower[half:, :half] @ first)
    return result
