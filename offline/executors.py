"""Where shards are run: in this process, in processes of their own, or through Ray."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..compiler.engine import Engine
from ..errors import DataError, UsageError
from .batches import Batch
from .infer import run_batches
from .job import Choice, Job, describe
from .layout import Layout
from .plan import pieces, tasks
from .source import Source
from .workers import Processes, Task, on_cpu, on_gpus

Done = Callable[[dict[str, Any]], None]
Tick = Callable[[int], None]
Shards = Mapping[int, dict[str, Any]]
"""Records by number."""


class Executor(Protocol):
    """Runs shards with engines that it opened."""

    def describe(self) -> dict[str, Any]:
        """Opens an engine; see `job.describe`."""

    def run(self, job: Job, source: Source, layout: Layout, there: Shards, done: Done, tick: Tick) -> None:
        """Runs all shards but those that are there.

        Args:
            done: told of the record of each, once it is on the disk.
            tick: told of rows that were run.
        """

    def close(self) -> None:
        """Ends what was started."""


def executor(
    choice: Choice, *, gpus: Sequence[int], processes: int | None, ray: str | None, log: Callable[[str], None]
) -> Executor:
    """The one that the options ask for.

    Raises:
        UsageError: they contradict each other.
        TargetUnavailableError: Ray is not installed.
    """
    if gpus and (ray is not None or processes is not None):
        raise UsageError(
            f"--gpus and {'--ray' if ray is not None else '--processes'} exclude each other",
            hint="--gpus starts a process for each; Ray takes the GPUs that it knows of, one an actor",
        )
    if len(set(gpus)) < len(gpus) or any(number < 0 for number in gpus):
        raise UsageError("--gpus names no GPUs", expected="different numbers, as 0,1", found=",".join(map(str, gpus)))
    if ray is not None:
        from .on_ray import OnRay

        return OnRay(choice, ray, processes)
    if gpus:
        return Many(Processes(choice, on_gpus(gpus), log))
    return Here(choice) if processes in (None, 1) else Many(Processes(choice, on_cpu(processes), log))


class Here:
    """One engine in this process."""

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._engine: Engine | None = None

    def describe(self) -> dict[str, Any]:
        """Opens the engine."""
        self._engine = self._choice.load()
        return describe(self._engine)

    def run(self, job: Job, source: Source, layout: Layout, there: Shards, done: Done, tick: Tick) -> None:
        """Reads ahead of the engine and writes behind it."""
        assert self._engine is not None
        every = pieces(source.parts(), layout, job.shard_rows)
        if source.files:
            every = (piece for piece in every if piece.shard not in there)
        batches = job.reader(layout).batches(every)
        if not source.files:
            batches = _unseen(batches, there, source)
        run_batches(self._engine, batches, job.outputs, Path(job.out), done, tick)

    def close(self) -> None:
        """Closes the engine."""
        if self._engine is not None:
            self._engine.close()


class Many:
    """An engine in each of several processes."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def describe(self) -> dict[str, Any]:
        """Opens the engine in the first."""
        return self._processes.describe()

    def run(self, job: Job, source: Source, layout: Layout, there: Shards, done: Done, tick: Tick) -> None:
        """Hands out shards."""
        self._processes.run(job, tasks_of(job, source, layout, there), done, tick)

    def close(self) -> None:
        """Ends the processes."""
        self._processes.close()


def tasks_of(job: Job, source: Source, layout: Layout, there: Container[int]) -> Iterator[Task]:
    """The shards that are not there. Those of a function never end: who runs them finds where they do."""
    if not source.files:
        yield from ((shard, None) for shard in itertools.count() if shard not in there)
        return
    for shard, found in tasks(pieces(source.parts(), layout, job.shard_rows)):
        if shard not in there:
            yield shard, [piece.to_json() for piece in found]


def _unseen(batches: Iterator[Batch], there: Shards, source: Source) -> Iterator[Batch]:
    """The batches of shards that are not there; a function must give the others as it did before.

    Raises:
        DataError: it gives something else.
    """
    for batch in batches:
        if batch.shard not in there:
            yield batch
        elif batch.last and batch.digest != there[batch.shard].get("inputs_sha256", batch.digest):
            raise DataError(
                f"{source.description} gives other rows than when this run began (shard {batch.shard})",
                hint="let it give the same rows each time, without a random order; --restart begins anew",
            )
