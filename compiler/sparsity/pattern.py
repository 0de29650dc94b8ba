"""The 2:4 pattern: of each four weights that follow each other along a layer's inputs, two at least are zero.

A weight is (out, in, *kernel) here: groups of four lie along `in`, at each place of the kernel for itself. That is
what sparse Tensor Cores skip and what TensorRT looks for.
"""

from __future__ import annotations

import math

import numpy as np

GROUP = 4
KEPT = 2


def is_sparse(weight: np.ndarray) -> bool:
    """Whether a weight (out, in, *kernel) has the pattern."""
    outputs, inputs, *kernel = weight.shape
    if inputs % GROUP or not weight.size:
        return False
    grouped = weight.reshape(outputs, inputs // GROUP, GROUP, math.prod(kernel))
    return bool((np.count_nonzero(grouped, axis=2) <= KEPT).all())


def strongest(scores: np.ndarray) -> np.ndarray:
    """Mask of the two largest of each four scores (..., n) that follow each other; of equal ones the first."""
    groups = scores.reshape(*scores.shape[:-1], -1, GROUP)
    order = np.argsort(-groups, axis=-1, kind="stable")
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, order[..., :KEPT], values=True, axis=-1)
    return mask.reshape(scores.shape)


def columns(inputs: int, places: int) -> np.ndarray:
    """The columns of a weight flattened to (out, in x places), reordered so that each group of four is in a row."""
    numbers = np.arange(inputs * places).reshape(inputs // GROUP, GROUP, places)
    return np.asarray(numbers.transpose(0, 2, 1).reshape(-1))
