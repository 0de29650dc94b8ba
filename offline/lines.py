"""Rows of JSON lines."""

from __future__ import annotations

import itertools
import json
from array import array as numbers
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import DataError
from .parts import Rows, Spec

STRIDE = 1024
"""Lines between two whose place is remembered."""


class _NoRowError(Exception):
    """What is wrong with a line."""


class LinesPart:
    """JSON lines: one object a row, with a number or nested lists for each name. Empty lines are passed over.

    Args:
        wanted: dtype and shape of a row of each array, None for an array of which nothing is asked; the dtype None
            stands for whatever the values are.
        seek: number of a row and where it begins, and rows that there are; where they are not given, all are counted.
    """

    def __init__(
        self,
        path: Path,
        wanted: Mapping[str, tuple[str | None, list[int] | None]],
        seek: tuple[int, int] | None = None,
        rows: int = 0,
    ) -> None:
        self.name = str(path)
        self._wanted = wanted
        self._first = seek[0] if seek else 0
        self._offsets = numbers("Q", [seek[1]] if seek else [])
        self._rows = rows
        if seek is None:
            self._count(path)
        self.specs: Mapping[str, Spec] = {
            name: Spec(np.dtype(dtype or "O"), (self._rows, *(shape or ()))) for name, (dtype, shape) in wanted.items()
        }
        self._stream: BinaryIO | None = None
        self._next = -1

    def _count(self, path: Path) -> None:
        with path.open("rb") as stream:
            offset = 0
            for line in stream:
                if line.strip():
                    if self._rows % STRIDE == 0:
                        self._offsets.append(offset)
                    self._rows += 1
                offset += len(line)

    def read(self, start: int, stop: int, stacked: Collection[str], whole: Collection[str]) -> Rows:
        """Rows as arrays; what does not fit is a problem of its row."""
        try:
            lines = list(itertools.islice(self._lines(start), stop - start))
        except OSError as error:
            raise DataError(f"{self.name} cannot be read", found=error) from error
        if len(lines) < stop - start:
            raise DataError(
                f"{self.name} has become shorter while it was read", expected=stop, found=start + len(lines)
            )
        self._next = stop
        problems: dict[int, str] = {}
        values: dict[str, list[Any]] = {name: [] for name in (*stacked, *whole)}
        for row, line in enumerate(lines):
            try:
                given = _object(line)
                found = {name: self._value(given, name) for name in values}
            except _NoRowError as error:
                problems[row] = str(error)
                kept = [name for name in values if self._wanted[name][0] is None]
                found = dict.fromkeys(values) | {name: _kept(line, name) for name in kept}
            for name, value in found.items():
                values[name].append(value)
        return Rows({name: self._stacked(name, rows) for name, rows in values.items()}, problems)

    def _lines(self, start: int) -> Iterator[bytes]:
        if self._stream is None or self._next != start:
            self._stream = self._stream or Path(self.name).open("rb")  # noqa: SIM115
            block = self._block(start)
            self._stream.seek(self._offsets[block])
            skip = start - self._first - block * STRIDE
        else:
            skip = 0
        return itertools.islice((line for line in iter(self._stream.readline, b"") if line.strip()), skip, None)

    def _block(self, row: int) -> int:
        return min((row - self._first) // STRIDE, len(self._offsets) - 1)

    def _value(self, given: Mapping[str, Any], name: str) -> Any:
        """A value of a row, as an array where it is an input."""
        if name not in given:
            raise _NoRowError(f"{name!r} is missing")
        dtype, shape = self._wanted[name]
        if dtype is None:
            return given[name]
        try:
            array = np.asarray(given[name])
            if array.dtype.kind not in "biuf" or (array.dtype.kind == "f" and np.dtype(dtype).kind in "biu"):
                raise _NoRowError(f"{name!r} is not of {dtype}")
            found = array.astype(dtype)
        except ValueError as error:
            raise _NoRowError(f"{name!r} holds lists of different lengths") from error
        if array.dtype.kind in "iu" and found.dtype.kind != "f" and not np.array_equal(found, array):
            raise _NoRowError(f"{name!r} holds a number that {dtype} cannot hold")
        if shape is not None and found.shape != tuple(shape):
            raise _NoRowError(f"{name!r} has the shape {found.shape} and not {tuple(shape)}")
        return found

    def _stacked(self, name: str, rows: list[Any]) -> np.ndarray:
        dtype, shape = self._wanted[name]
        if dtype is None:
            missing = "" if any(isinstance(row, str) for row in rows) else 0
            try:
                return np.asarray([missing if row is None else row for row in rows])
            except ValueError as error:
                raise DataError(f"{self.name}: {name!r} differs in shape from row to row", found=error) from error
        empty = np.zeros(tuple(shape or ()), dtype)
        return np.stack([empty if row is None else row for row in rows])

    def close(self) -> None:
        """Closes the file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def place(self, start: int) -> dict[str, Any]:
        """Path, what is wanted, and the last line before `start` whose place is known."""
        block = self._block(start)
        seek = self._first + block * STRIDE, self._offsets[block]
        return {"path": self.name, "wanted": self._wanted, "seek": seek, "rows": self._rows}


def _object(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise _NoRowError(f"no JSON: {error}") from error
    if not isinstance(values, dict):
        raise _NoRowError(f"a {type(values).__name__} and no object")
    return values


def _kept(line: bytes, name: str) -> Any:
    """What is handed on of a row that is bad."""
    try:
        return _object(line).get(name)
    except _NoRowError:
        return None


def first_line_of(path: Path) -> dict[str, Any]:
    """The first object of a JSON lines file; an empty one where the line is something else.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            line = next((line for line in stream if line.strip()), b"{}")
        value = json.loads(line)
    except OSError as error:
        raise DataError(f"{path} cannot be read", found=error) from error
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
