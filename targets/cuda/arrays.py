"""Caches in the memory of a device, copied and cut as generation does it with arrays of NumPy.

    cache[rows]                 some rows
    cache[:, :, :n]             the first n tokens
    cache[row, :, :n] = other   copies, from this device or from the host
    np.asarray(cache)           a copy on the host

All of them are views, which a call of an engine may be given where they are of whole rows.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from .driver import call
from .stream import Stream

HOST, DEVICE = 1, 2
"""CU_MEMORYTYPE_HOST and CU_MEMORYTYPE_DEVICE."""

T = TypeVar("T")
Turn = Callable[[Callable[[], T]], T]
Key = Any


class _Place(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_size_t),
        ("y", ctypes.c_size_t),
        ("kind", ctypes.c_int),
        ("host", ctypes.c_void_p),
        ("device", ctypes.c_uint64),
        ("array", ctypes.c_void_p),
        ("pitch", ctypes.c_size_t),
    )


class _Copy(ctypes.Structure):
    """CUDA_MEMCPY2D of cuda.h."""

    _fields_ = (("source", _Place), ("target", _Place), ("width", ctypes.c_size_t), ("height", ctypes.c_size_t))


class DeviceArray:
    """The first tokens of some rows of a cache (batch, heads, room, width).

    Args:
        value: the whole cache, an OrtValue.
        turn: makes a call in the thread and on the device of the runner.
        rows: first row, and the one behind the last.
        tokens: how many of the room.
        single: whether it is one row without its axis.
    """

    def __init__(
        self, value: Any, dtype: np.dtype[Any], stream: Stream, turn: Turn[None], rows: tuple[int, int], tokens: int,
        *, single: bool = False,
    ) -> None:  # fmt: skip
        self.dtype = dtype
        self._value, self._stream, self._turn = value, stream, turn
        self._rows, self._tokens, self._single = rows, tokens, single
        _, self._heads, self._room, self._width = value.shape()

    @property
    def shape(self) -> tuple[int, ...]:
        """(batch, heads, tokens, width), or without the first where it is one row."""
        start, stop = self._rows
        rest = (self._heads, self._tokens, self._width)
        return rest if self._single else (stop - start, *rest)

    @property
    def nbytes(self) -> int:
        """Of what it shows."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def address(self) -> int:
        """Where its first row begins."""
        return int(self._value.data_ptr() + self._rows[0] * self._heads * self._pitch)

    def __getitem__(self, key: Key) -> DeviceArray:
        rows, heads, tokens = (*(key if isinstance(key, tuple) else (key,)), slice(None), slice(None))[:3]
        if self._single or heads != slice(None) or tokens.start or tokens.step or isinstance(tokens, int):
            raise IndexError(f"a cache on a device has rows and first tokens, not {key!r}")
        first, last = self._rows
        single = not isinstance(rows, slice)
        here = range(first, last)[rows]
        start, stop = (here, here + 1) if isinstance(here, int) else (here.start, here.stop)
        length = len(range(self._tokens)[tokens])
        return DeviceArray(self._value, self.dtype, self._stream, self._turn, (start, stop), length, single=single)

    def __setitem__(self, key: Key, source: DeviceArray | np.ndarray) -> None:
        target = self[key]
        if math.prod(source.shape) != math.prod(target.shape) or source.shape[-3:] != target.shape[-3:]:
            raise ValueError(f"an array of {source.shape} does not go into {target.shape}")
        if isinstance(source, DeviceArray):
            place = source._here()
        else:
            array = np.ascontiguousarray(source, dtype=self.dtype)
            place = self._host(array.ctypes.data, target._tokens * target._width * self.dtype.itemsize)
        self._turn(lambda: target._move(place, target._here()))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.empty(self.shape, self.dtype)
        line = self._tokens * self._width * self.dtype.itemsize
        target = self._host(array.ctypes.data, line)
        self._turn(lambda: self._move(self._here(), target))
        return array if dtype is None else array.astype(dtype)

    def copy(self) -> DeviceArray:
        """In memory of its own, with room for these tokens alone."""
        start, stop = self._rows
        made = new(stop - start, (self._heads, self._tokens, self._width), self.dtype, self._stream, self._turn)
        made[:] = self
        return made

    def fill_with_zeros(self) -> None:
        """Sets all bytes of whole rows to 0. Called in a turn."""
        assert self._tokens == self._room
        call(
            "cuMemsetD8Async", ctypes.c_uint64(self.address), ctypes.c_ubyte(0), ctypes.c_size_t(self.nbytes),
            self._stream.pointer,
        )  # fmt: skip

    @property
    def _pitch(self) -> int:
        """Bytes from a head to the next."""
        return int(self._room * self._width * self.dtype.itemsize)

    def _move(self, source: _Place, target: _Place) -> None:
        """Copies what this shows, or as much."""
        start, stop = self._rows
        width, height = self._tokens * self._width * self.dtype.itemsize, (stop - start) * self._heads
        if width and height:
            call("cuMemcpy2DAsync_v2", ctypes.byref(_Copy(source, target, width, height)), self._stream.pointer)
        if HOST in (source.kind, target.kind):
            self._stream.synchronize()

    def _here(self) -> _Place:
        return _Place(kind=DEVICE, device=self.address, pitch=self._pitch)

    @staticmethod
    def _host(address: int, pitch: int) -> _Place:
        return _Place(kind=HOST, host=address, pitch=pitch)


def new(rows: int, shape: tuple[int, ...], dtype: np.dtype[Any], stream: Stream, turn: Turn[None]) -> DeviceArray:
    """New memory for so many rows of (heads, room, width), not set."""
    from .onnxruntime import empty

    value = empty((rows, *shape), dtype.type, stream)
    return DeviceArray(value, dtype, stream, turn, (0, rows), shape[1])
