"""Giving memory back between the steps of a compile, so that the peaks of the steps do not add up."""

from __future__ import annotations

import ctypes
import gc

import psutil

GROWTH_BYTES = 32 << 20
"""By how much the process has to have grown for it to be worth a tenth of a second to look at all its objects."""


class _Memory:
    """What the process held when it was last looked through."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._held_bytes = 0

    def release(self) -> None:
        """Collects and trims, where the process has grown."""
        if self._process.memory_info().rss < self._held_bytes + GROWTH_BYTES:
            return
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        self._held_bytes = self._process.memory_info().rss


_MEMORY = _Memory()


def release() -> None:
    """Frees what nothing refers to any more, and hands the allocator's free pages back to the system (glibc only).

    It does nothing where the process is hardly larger than after the last time.
    """
    _MEMORY.release()
