"""Tokens that only fill a batch up, told by the mask that the model is given; they would drown the others."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def unpadded(x: np.ndarray, sample: Mapping[str, np.ndarray]) -> np.ndarray:
    """An activation without its padded positions, as (rows, channels); as it is where there is no mask for it.

    Args:
        x: (batch, length, channels); other ranks have no tokens that could be told.

    A mask is an input (batch, length) of zeros and ones, with a one in every row, of integers or booleans, that is
    called one: the token types of BERT look alike. In torch's `key_padding_mask` ones are what to leave out.
    """
    if x.ndim != 3:
        return x
    for name, array in sample.items():
        named = "mask" in name.lower() and "padding" not in name.lower()
        if named and array.shape == x.shape[:2] and array.dtype.kind in "bui" and is_mask(array):
            return np.asarray(x[array.astype(bool)].reshape(-1, x.shape[-1]))
    return x


def is_mask(array: np.ndarray) -> bool:
    """Whether an input tells which positions count."""
    return bool(((array == 0) | (array == 1)).all() and array.any(axis=1).all() and not array.all())
