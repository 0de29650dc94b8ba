"""Whether the data come as fast as the engine takes them: reading and preparing a batch, against running it."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator

from ..data import Data

READING_S = 1.0
MOST = 64
"""How long batches are read, and how many at most."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the source of data takes for a batch.

    Attributes:
        read_ms: median of a batch but for the first, where there are several.
        first_ms: of the first, with what opening the source takes.
    """

    description: str
    batches: int
    read_ms: float
    first_ms: float

    def share(self, run_ms: float) -> float:
        """Of the time of a batch that is read and run one after the other, the part in which it is read."""
        return self.read_ms / (self.read_ms + run_ms) if self.read_ms + run_ms else 0.0

    def is_bound(self, run_ms: float) -> bool:
        """Whether the engine waits for data however well reading and running overlap."""
        return self.read_ms > run_ms


def time_reading(data: Data) -> Reading | None:
    """Reads some batches as the source gives them; None where they are made up."""
    if data.random:
        return None
    times: list[float] = []
    batches: Iterator[object] = data.unchecked()
    deadline = time.perf_counter() + READING_S
    while len(times) < MOST and (not times or time.perf_counter() < deadline):
        start = time.perf_counter()
        if next(batches, None) is None:
            break
        times.append(1000 * (time.perf_counter() - start))
    if not times:
        return None
    return Reading(data.description, len(times), statistics.median(times[1:] or times), times[0])
