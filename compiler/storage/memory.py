"""Giving memory back between the steps of a compile, so that the peaks of the steps do not add up."""

from __future__ import annotations

import ctypes
import gc


def release() -> None:
    """Frees what nothing refers to any more, and hands the allocator's free pages back to the system (glibc only)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
