"""Reads batches in a thread, ahead of the engine."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

from .batches import Batch

T = TypeVar("T")

GROUP_BYTES = 1 << 20
"""What is read at once, where batches are smaller."""


def grouped(batches: Iterator[Batch]) -> Iterator[list[Batch]]:
    """The same batches, small ones together: a thread that wakes up for each would cost more than it reads."""
    group: list[Batch] = []
    size = 0
    for batch in batches:
        group.append(batch)
        size += sum(array.nbytes for array in batch.inputs.values())
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


@contextlib.contextmanager
def ahead(items: Iterator[T], depth: int) -> Iterator[Iterator[T]]:
    """The same items, of which a thread has up to `depth` ready. What it raises is raised where they are read."""
    end = object()
    with ThreadPoolExecutor(1, "enginesmith-read") as thread:
        ready = collections.deque(thread.submit(next, items, end) for _ in range(depth))

        def consume() -> Iterator[T]:
            while (item := ready.popleft().result()) is not end:
                ready.append(thread.submit(next, items, end))
                yield cast("T", item)

        try:
            yield consume()
        finally:
            for future in ready:
                future.cancel()
