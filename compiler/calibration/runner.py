"""Runs batches through a graph with probes, two at a time, and gives their readings in order.

Reductions and small nodes gain little from a second core, and while they run, or NumPy does, it would wait. Of two runs
one always has work for it.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ..graph import Graph
from ..machine.environment import cores
from .reductions import Reading, Reduced

Batch = Mapping[str, np.ndarray]

_ALWAYS = 64
"""Up to this sample elements and means of images are taken from every batch; that takes longer than extremes."""
_SELDOM = 16
"""After it, from every so many-th batch."""

_TOGETHER = 2
"""How many batches run at a time; another one is read meanwhile."""


def samples_in(batch: Batch) -> int:
    """Length of the leading axis of the first input that has one."""
    return next((len(array) for array in batch.values() if array.ndim), 1)


@dataclasses.dataclass(frozen=True)
class _Job:
    """A batch on its way."""

    batch: Batch
    draws: np.ndarray
    images: bool
    reduced: Reduced
    readings: Future[dict[str, Reading]]


class Runner:
    """Gives the readings of batches; tensors in which NaN, infinity or the like turn up are guarded from then on.

    Args:
        graph: with types and ranks inferred; stays as it is.
        names: tensors to read, the float outputs of the graph among them.
        axes: of the channels, by name.
        sampled: tensors to give elements of.
        threads: that all runs together may use, 0 for one a physical core. One thread runs one batch at a time.
    """

    def __init__(
        self, graph: Graph, names: Collection[str], axes: Mapping[str, int], sampled: Collection[str], threads: int
    ) -> None:
        self._graph = graph
        self._names = names
        self._axes = axes
        self._sampled = sampled
        threads = threads or cores()
        self._together = min(_TOGETHER, threads)
        self._threads = threads - self._together + 1  # runs share all but the thread that each begins in
        self._guarded: frozenset[str] = frozenset()
        self._built: dict[bool, Reduced] = {}
        self._samples = self._skipped = 0

    def __call__(self, batches: Iterable[tuple[Batch, np.ndarray]]) -> Iterator[tuple[Batch, dict[str, Reading]]]:
        """Takes batches with their random numbers, see `Reduced`, and gives each with its readings, in order."""
        jobs: deque[_Job] = deque()
        with ThreadPoolExecutor(self._together, thread_name_prefix="calibration") as pool:
            for batch, draws in batches:
                jobs.append(self._begun(batch, draws, pool))
                if len(jobs) > self._together:
                    yield self._done(jobs.popleft())
            while jobs:
                yield self._done(jobs.popleft())

    def _begun(self, batch: Batch, draws: np.ndarray, pool: ThreadPoolExecutor) -> _Job:
        images = self._samples < _ALWAYS or self._skipped == _SELDOM - 1
        self._samples += samples_in(batch)
        self._skipped = 0 if images else self._skipped + 1
        reduced = self._reduced(images)
        idle = images and reduced.has_images and self._samples >= _ALWAYS  # most of the time, from now on
        future = pool.submit(reduced, batch, draws, shrink=idle)
        return _Job(batch, draws, images, reduced, future)

    def _done(self, job: _Job) -> tuple[Batch, dict[str, Reading]]:
        readings, used = job.readings.result(), job.reduced
        while True:
            if used.guarded != self._guarded:  # NaN in a batch before, told when this one was on its way
                used = self._reduced(job.images)
            elif found := {name for name, reading in readings.items() if not (name in used.guarded or reading.sound)}:
                self._guarded |= found
                self._built.clear()
                used = self._reduced(job.images)
            else:
                return job.batch, readings
            readings = used(job.batch, job.draws)

    def _reduced(self, images: bool) -> Reduced:
        """With elements and means of images, or without; one does for both where there are no images."""
        if images not in self._built:
            if not all(built.has_images for built in self._built.values()):
                return self._built[not images]
            self._built[images] = Reduced(
                self._graph,
                self._names,
                axes=self._axes,
                sampled=self._sampled,
                images=images,
                guarded=self._guarded,
                threads=self._threads,
            )
        return self._built[images]
