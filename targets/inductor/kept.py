"""Caches in torch's memory, which generation cuts and copies like arrays of NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .._torch import to_array


class Kept:
    """A cache, or a part of one, cut and copied like an array of NumPy.

    Attributes:
        tensor: what it shows.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(batch, heads, tokens, width), or less where it was cut."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """As NumPy calls it."""
        return np.dtype(str(self.tensor.dtype).removeprefix("torch."))

    @property
    def nbytes(self) -> int:
        """Of what it shows."""
        return self.tensor.nbytes

    def __getitem__(self, key: Any) -> Kept:
        return Kept(self.tensor[key])

    def __setitem__(self, key: Any, source: Kept | np.ndarray) -> None:
        self.tensor[key] = source.tensor if isinstance(source, Kept) else torch.from_numpy(np.array(source, order="C"))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = to_array(self.tensor)
        return array.astype(array.dtype if dtype is None else dtype, copy=bool(copy))

    def copy(self) -> Kept:
        """In memory of its own."""
        return Kept(self.tensor.clone())
