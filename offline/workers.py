"""Runs shards in processes, each with an engine of its own: one a GPU, or several on a CPU.

A process that dies is started again, and its shard with it; a shard on which three died ends the run.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..compiler.machine.environment import cores
from ..errors import EngineError, EnginesmithError
from ..targets._worker import Worker
from .job import Choice, Job, from_json
from .worker import command

Task = tuple[int, list[dict[str, Any]] | None]
"""Number and pieces of a shard; None for pieces where the process counts them itself."""

ATTEMPTS = 3
OPEN_S = 3600.0
FOREVER_S = 1e8
"""Nobody can say how long a shard may take."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process runs.

    Attributes:
        environment: variables that say so.
        options: of the engine's target that say so.
    """

    name: str
    environment: Mapping[str, str]
    options: Mapping[str, Any]


def on_gpus(numbers: Sequence[int]) -> list[Place]:
    """A place a GPU, counted as CUDA_VISIBLE_DEVICES of this process orders them."""
    visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    chosen = {n: visible[n] if n < len(visible) else str(n) for n in numbers}
    return [Place(f"GPU {n}", {"CUDA_VISIBLE_DEVICES": device}, {"device_id": 0}) for n, device in chosen.items()]


def on_cpu(count: int) -> list[Place]:
    """Places that share the cores: an engine with a thread for each core, in each of them, would be slower than one."""
    threads = max(cores() // count, 1)
    return [Place(f"process {n}", {"OMP_NUM_THREADS": str(threads)}, {"threads": threads}) for n in range(count)]


class Processes:
    """Processes with an engine each. They are to be closed.

    Args:
        log: told of processes that died.
    """

    def __init__(self, choice: Choice, places: Sequence[Place], log: Callable[[str], None]) -> None:
        self._choice = choice
        self._places = places
        self._log = log
        self._lock = threading.Lock()
        self._workers: dict[str, Worker] = {}
        self._over = False

    def close(self) -> None:
        """Ends the processes at once."""
        with self._lock:
            self._over = True
            for worker in self._workers.values():
                worker.kill()

    def describe(self) -> dict[str, Any]:
        """What `job.describe` says of the engine, which all take from now on. All are open then."""
        found = self._open(self._places[0], described=True)
        self._choice = dataclasses.replace(self._choice, engine=found["engine"], verify=False)
        with ThreadPoolExecutor(len(self._places)) as pool:
            try:
                list(pool.map(self._open, self._places[1:]))
            except BaseException:
                self.close()  # or the pool would wait until the others are open
                raise
        return found

    def run(
        self, job: Job, tasks: Iterator[Task], done: Callable[[dict[str, Any]], None], tick: Callable[[int], None]
    ) -> None:
        """Runs the shards; `done` and `tick` are told of each, in the order in which they end.

        Raises:
            EnginesmithError: a shard failed, or a process cannot be kept alive.
        """
        found: queue.Queue[dict[str, Any] | EnginesmithError | None] = queue.Queue()
        request = dataclasses.asdict(job)

        def serve(place: Place) -> None:
            try:
                while (task := self._taken(tasks)) is not None and (answer := self._attempted(place, request, task)):
                    found.put(answer)
                found.put(None)
            except EnginesmithError as error:
                found.put(error)

        for place in self._places:
            threading.Thread(target=serve, args=(place,), daemon=True).start()
        left = len(self._places)
        while left:
            answer = found.get()
            if answer is None:
                left -= 1
            elif isinstance(answer, EnginesmithError):
                raise answer
            else:
                done(answer)
                tick(answer["rows"])

    def _taken(self, tasks: Iterator[Task]) -> Task | None:
        with self._lock:
            return None if self._over else next(tasks, None)

    def _attempted(self, place: Place, job: dict[str, Any], task: Task) -> dict[str, Any] | None:
        """The record of a shard; None at the end of the data."""
        shard, spans = task
        for attempt in itertools.count(1):
            if place.name not in self._workers:
                self._open(place)
            worker = self._workers[place.name]
            try:
                answer = worker.call("run", timeout_s=FOREVER_S, job=job, shard=shard, spans=spans)
                break
            except EngineError as error:
                self._drop(place)
                if self._over or attempt == ATTEMPTS:
                    error.message = f"shard {shard} failed {attempt} times; the last: {error.message}"
                    raise
                self._log(f"{error.message}; shard {shard} is run again")
        if "error" in answer:
            raise from_json(answer["error"])
        record: dict[str, Any] | None = answer.get("record")
        return record

    def _open(self, place: Place, *, described: bool = False) -> dict[str, Any]:
        variables = [f"{name}={value}" for name, value in place.environment.items()]
        with self._lock:
            if self._over:
                raise EngineError("the run is over")
            worker = Worker(["env", *variables, *command()], name=f"the engine on {place.name}", failure=EngineError)
            self._workers[place.name] = worker
        choice = dataclasses.asdict(dataclasses.replace(self._choice, options=place.options))
        answer = worker.call("open", timeout_s=OPEN_S, choice=choice, described=described)
        if "error" in answer:
            raise from_json(answer["error"])
        return answer

    def _drop(self, place: Place) -> None:
        with self._lock:
            worker = self._workers.pop(place.name, None)
        if worker is not None:
            worker.kill()
