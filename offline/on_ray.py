"""Runs shards through Ray Data: `map_batches` over shards, with actors that have an engine each.

Only numbers of rows travel: an actor reads its rows and writes its shard itself, so that bundle, data and output must
lie at the same paths on every machine of a cluster. Ray starts an actor that died again, and its shard with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..compiler.machine.ray import connect, reason, require_ray
from ..errors import DataError, EngineError, EnginesmithError
from .executors import Done, Tick, tasks_of
from .executors import Shards as There
from .job import Choice, Job, Shards, describe, from_json, to_json
from .layout import Layout
from .source import Source
from .workers import ATTEMPTS


class Actor:
    """One engine. Ray calls it with a shard at a time."""

    def __init__(self, folder: str, choice: Mapping[str, Any], job: Mapping[str, Any]) -> None:
        os.chdir(folder)  # paths are as the user gave them
        self._choice = Choice(**choice)
        self._job = Job(**job)
        self._shards: Shards | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The record of a shard, or its error, as JSON: Ray would try an error that is raised again, and wrap it."""
        return {"answer": [json.dumps(self._answer(**json.loads(str(text)))) for text in batch["task"]]}

    def _answer(self, shard: int, spans: list[dict[str, Any]]) -> dict[str, Any]:
        attempts = Path(self._job.out) / f"attempts-{shard:08d}.partial"
        if _count(attempts) > ATTEMPTS:
            message = f"shard {shard} failed {ATTEMPTS} times: the process that ran it died each time"
            return {"error": to_json(EngineError(message, hint="run it without --ray to see what it dies of"))}
        try:
            self._shards = self._shards or Shards(self._choice.load())
            return self._shards.run(self._job, shard, spans)
        except EnginesmithError as error:
            return {"error": to_json(error)}
        finally:
            attempts.unlink(missing_ok=True)


class OnRay:
    """Actors of Ray.

    Args:
        address: of a cluster, or `LOCAL`.
        actors: how many; None for one a GPU, or a single one where the engine runs on a CPU.
    """

    def __init__(self, choice: Choice, address: str, actors: int | None) -> None:
        check_ray()
        self._choice = choice
        self._address = address
        self._actors = actors
        self._own = False
        self._device = "cpu"

    def describe(self) -> dict[str, Any]:
        """Connects to Ray, and opens the engine on one of its machines."""
        import ray

        self._own = connect(self._address)
        gpus = ray.cluster_resources().get("GPU", 0)

        def opened(folder: str, choice: Mapping[str, Any]) -> dict[str, Any]:
            os.chdir(folder)
            try:
                with Choice(**choice).load() as engine:
                    return describe(engine)
            except EnginesmithError as error:
                return {"error": to_json(error)}

        task = ray.remote(num_gpus=1 if gpus else 0, max_calls=1)(opened)
        with _ray_errors():
            choice = dataclasses.replace(self._choice, options={"device_id": 0})  # Ray shows it one GPU
            found: dict[str, Any] = ray.get(task.remote(str(Path.cwd()), dataclasses.asdict(choice)))
        if "error" in found:
            raise from_json(found["error"])
        self._choice = dataclasses.replace(self._choice, engine=found["engine"], verify=False)
        self._device = "cuda" if "cuda" in found["devices"] and gpus else "cpu"
        return found

    def run(self, job: Job, source: Source, layout: Layout, there: There, done: Done, tick: Tick) -> None:
        """Sends the shards through `map_batches`."""
        import ray
        import ray.data

        if not source.files:
            raise DataError(
                f"{source.description} can only be read from the beginning on, so that actors cannot share it",
                expected="files of .npy, .npz or .jsonl",
                hint="write its rows to files, or leave out --ray",
            )
        todo = tasks_of(job, source, layout, there)
        items = [{"task": json.dumps({"shard": shard, "spans": spans})} for shard, spans in todo]
        if not items:
            return
        _quiet()
        gpus = int(ray.cluster_resources().get("GPU", 0)) if self._device == "cuda" else 0
        actors = min(self._actors or gpus or 1, len(items))
        threads = _share(actors)
        needs = {"num_gpus": 1} if gpus else {"num_cpus": threads}
        options = {"device_id": 0} if gpus else {"threads": threads} if actors > 1 else {}
        answers = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            Actor,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            fn_constructor_kwargs={
                "folder": str(Path.cwd()),
                "choice": dataclasses.asdict(dataclasses.replace(self._choice, options=options)),
                "job": dataclasses.asdict(job),
            },
            **needs,
        )
        with _ray_errors():
            for row in answers.iter_rows():
                answer = json.loads(row["answer"])
                if "error" in answer:
                    raise from_json(answer["error"])
                done(answer["record"])
                tick(answer["record"]["rows"])

    def close(self) -> None:
        """Stops a Ray that was started here."""
        import ray

        if self._own:
            ray.shutdown()


def check_ray() -> None:
    """Raises TargetUnavailableError where Ray is not installed."""
    require_ray("ray.data", "--ray", "--gpus and --processes need nothing more")


def _share(actors: int) -> int:
    """Processors of each actor: its part of all, and no more than the smallest machine has."""
    import ray

    counts = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return max(1, min(sum(counts) // actors, min((count for count in counts if count), default=1)))


def _quiet() -> None:
    """Leaves telling how far it is to our own progress."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False


@contextlib.contextmanager
def _ray_errors() -> Iterator[None]:
    import ray.exceptions

    try:
        yield
    except ray.exceptions.RayError as error:
        raise EngineError("Ray failed", found=reason(error), hint="run the same command again: it goes on") from error


def _count(attempts: Path) -> int:
    """How often a shard was begun: in a file, as who counted in memory has died."""
    with contextlib.suppress(OSError):
        with attempts.open("a") as stream:
            stream.write(".")
        return attempts.stat().st_size
    return 0
