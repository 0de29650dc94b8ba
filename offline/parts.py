"""Pieces of data that know their rows before they are read.

Rows of files are read from where they lie, by seeking: neither a whole array nor a memory map of it is ever held, so
that the size of a file does not matter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

Arrays = dict[str, np.ndarray]


class Spec(NamedTuple):
    """What a header tells of an array."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class Rows(NamedTuple):
    """Rows as they were read, and why some of them are no rows; those are zero in the arrays."""

    arrays: Arrays
    problems: Mapping[int, str] = {}


class Part(Protocol):
    """Arrays by name whose leading axes are rows.

    Attributes:
        name: where the rows come from, for messages.
    """

    name: str

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Every array in it, by name."""

    def read(self, start: int, stop: int, stacked: Collection[str], whole: Collection[str]) -> Rows:
        """Rows of the `stacked` arrays, and the `whole` ones whole.

        Raises:
            DataError: it cannot be read.
        """

    def close(self) -> None:
        """Lets go of open files; reading opens them again."""

    def place(self, start: int) -> dict[str, Any]:
        """What another process needs to read rows from `start`: arguments of `source.part_of`."""


class MemoryPart:
    """Arrays that a function gave."""

    def __init__(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        self.name = name
        self._arrays = arrays
        self.specs: Mapping[str, Spec] = {name: Spec(array.dtype, array.shape) for name, array in arrays.items()}

    def read(self, start: int, stop: int, stacked: Collection[str], whole: Collection[str]) -> Rows:
        """Views of the arrays."""
        rows = {name: self._arrays[name][start:stop] for name in stacked}
        return Rows(rows | {name: self._arrays[name] for name in whole})

    def close(self) -> None:
        """Nothing is open."""

    def place(self, start: int) -> dict[str, Any]:
        """It has none."""
        raise NotImplementedError
