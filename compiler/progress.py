"""How a long job tells what it is doing. The default tells nobody; the command line draws it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from .manifest import Stage


class Progress:
    """Takes what happens. Subclasses show it."""

    def stage(self, name: str, number: int, total: int) -> None:
        """A named stage begins."""

    def update(self, fraction: float, what: str) -> None:
        """Within the stage, this fraction (0 to 1) is done."""


class Stages:
    """Times named stages and keeps their records."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self.records: list[Stage] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[Stage]:
        """Runs the block as a stage; the block may set the record's `detail`."""
        record = Stage(name=name, seconds=0.0, detail="")
        self.records.append(record)
        self._progress.stage(name, len(self.records), self._total)
        start = time.perf_counter()
        yield record
        record["seconds"] = time.perf_counter() - start

    def update(self, fraction: float, what: str) -> None:
        """Tells how far the stage is."""
        self._progress.update(fraction, what)
