"""Keeps the alternate signal stack of the calling thread as it is, whatever a library does to it.

OpenVINO gives the thread that compiles a model an alternate signal stack, and puts back the one before when the model
goes. Where models end in another order than they came, that is one whose memory is gone, and the next signal that has a
handler, such as SIGTERM, kills the process.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator


class _Stack(ctypes.Structure):
    """stack_t of sigaltstack(2)."""

    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Once left, the thread has the alternate signal stack that it had before, or none."""
    library, before = ctypes.CDLL(None), _Stack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)
