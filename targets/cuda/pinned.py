"""Memory of the host that a device copies to while the host goes on."""

from __future__ import annotations

import contextlib
import ctypes
import math
import weakref
from typing import Any

import numpy as np

from ...errors import EngineError
from .driver import call
from .stream import Stream

_PORTABLE = 1  # CU_MEMHOSTALLOC_PORTABLE


def pinned(shape: tuple[int, ...], dtype: Any, stream: Stream) -> np.ndarray:
    """A new array in memory that stays where it is. Called with the stream's device current.

    Raises:
        EngineError: there is no such memory left.
    """
    address, kind, count = ctypes.c_void_p(), np.dtype(dtype), math.prod(shape)
    size = max(count * kind.itemsize, 1)
    call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(size), _PORTABLE)
    memory = (ctypes.c_char * size).from_address(address.value or 0)
    weakref.finalize(memory, _free, stream, address)
    return np.frombuffer(memory, kind, count).reshape(shape)


def _free(stream: Stream, address: ctypes.c_void_p) -> None:
    with contextlib.suppress(EngineError), stream.current():  # at the end of the process the driver may be gone
        call("cuMemFreeHost", address)
