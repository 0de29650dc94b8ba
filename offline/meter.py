"""How far a run is, how fast, and how long it will take: measured over the last minute, without what was there."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable

from ..compiler.progress import Progress

WINDOW_S = 60.0


class Meter:
    """Counts rows and tells a progress. Calls may come from several threads.

    Args:
        total: rows of the data; None where only reading tells.
        before: rows that were there already.
    """

    def __init__(
        self,
        progress: Progress,
        total: int | None,
        before: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._progress = progress
        self._total = total
        self._before = before
        self._clock = clock
        self._lock = threading.Lock()
        self._begin = clock()
        self._marks = collections.deque([(self._begin, 0)])
        self.rows = 0

    @property
    def seconds(self) -> float:
        """Time since it was made."""
        return self._clock() - self._begin

    def tick(self, rows: int) -> None:
        """These many more rows are done."""
        with self._lock:
            now = self._clock()
            self.rows += rows
            if now - self._marks[-1][0] < WINDOW_S / 100:
                self._marks.pop() if len(self._marks) > 1 else None
            self._marks.append((now, self.rows))
            while len(self._marks) > 2 and self._marks[1][0] <= now - WINDOW_S:
                self._marks.popleft()
            done = self._before + self.rows
            self._progress.update(done / self._total if self._total else 0.0, self._text(done))

    def _text(self, done: int) -> str:
        (begin, first), (end, last) = self._marks[0], self._marks[-1]
        rate = (last - first) / (end - begin) if end > begin else 0.0
        of = f" of {self._total:,}" if self._total is not None else ""
        text = f"{done:,}{of} rows, {rate_text(rate)} rows/s"
        if self._total is not None and rate:
            text += f", {duration((self._total - done) / rate)} left"
        return text


def rate_text(rate: float) -> str:
    """Three digits that matter."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def duration(seconds: float) -> str:
    """In the two largest units."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    if seconds >= 86400:
        return f"{seconds // 86400} d {seconds % 86400 // 3600} h"
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 60} min {seconds % 60} s" if seconds >= 60 else f"{seconds} s"
