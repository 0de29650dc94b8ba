"""Stages of a bundle's engine on several machines: an actor of Ray for each, joined by a compiled graph.

    caller --> channel --> actor 0 --> channel --> actor 1 --> ... --> caller

The graph is compiled once; then micro-batches flow through shared memory within a machine, and through Ray's channels
between machines, without a scheduler. The bundle lies at the same path on every machine. Ray calls compiled graphs
experimental; a graph owns its actors, and one of which an actor died is of no more use.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...compiler.machine.ray import LOCAL, connect, reason, require_ray
from ...compiler.signature import Signature
from ...errors import EngineError, UsageError
from ..base import EngineInfo, Runner
from .plan import Cutter, Plan

IN_FLIGHT = 8
"""Micro-batches that are under way at a time."""

Values = dict[str, Any]


class StageActor:
    """One stage. Ray makes it, and calls `run` with a micro-batch at a time.

    Args:
        bundle: the folder, as an absolute path.
        engine: name of the pipeline's engine.
        number: of the stage.
    """

    def __init__(self, bundle: str, engine: str, number: int) -> None:
        from ...compiler.engine import check_files, read_manifest
        from .. import get_target
        from ..pipeline import Pipeline

        check_files(Path(bundle), engine, read_manifest(Path(bundle)))
        folder = Path(bundle) / "engines" / engine
        info, self._plan = EngineInfo.read(folder), Plan.read(folder)
        target = get_target(info.target, info.options)
        assert isinstance(target, Pipeline)
        self._link, self._needed = self._plan.links[number], self._plan.needed(number)
        # Ray shows an actor its own GPU alone, as the first.
        self._runner: Runner = target.stage_runner(folder / self._link.folder, number, device=0)

    def run(self, values: Values) -> Values:
        """What is still wanted behind the stage."""
        made = self._runner.run({name: values[name] for name in self._link.inputs})
        return {name: value for name, value in {**values, **made}.items() if name in self._needed}

    def ready(self) -> bool:
        """Answers once the engine is loaded."""
        return True


class RayPipeline:
    """A pipeline of a bundle over machines. Calls come from one thread.

    Args:
        bundle: the folder; it lies at the same path on every machine.
        engine: name of an engine of target ``pipeline``; None for the first.
        address: of a cluster, as `ray.init` takes it, or ``local`` for a Ray of one's own.
        resources: what the actor of each stage needs, as ``{"num_gpus": 1}`` or ``{"resources": {"rack-2": 1}}``, one
            for each stage or one for all; None for a GPU each where the stages run on GPUs, and a processor elsewhere.
        micro_batch: rows of a micro-batch; None for what the engine was built with.
        timeout_s: how long a micro-batch may take, and the loading of a stage.

    Raises:
        UsageError: no bundle, no such engine, or no Ray at the address.
        TargetUnavailableError: Ray is not installed.
        EngineError: a stage could not be loaded.
    """

    def __init__(
        self,
        bundle: str | Path,
        engine: str | None = None,
        *,
        address: str = LOCAL,
        resources: Sequence[Mapping[str, Any]] | None = None,
        micro_batch: int | None = None,
        timeout_s: float = 300.0,
    ) -> None:
        check_ray()
        root = Path(bundle).absolute()
        name = _engine(root, engine)
        info = EngineInfo.read(root / "engines" / name)
        self._signature: Signature = info.signature
        self._plan = Plan.read(root / "engines" / name)
        stages = len(self._plan.links)
        self._cutter = Cutter(info.signature, stages, micro_batch or info.options.get("micro_batch"))
        self._timeout_s = timeout_s
        self._own = connect(address)
        needs = _needs(info, stages, resources)
        self._actors, self._graph = self._compiled(str(root), name, needs)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, for inputs that `Signature.check` accepts.

        Raises:
            DataError: inputs that do not fit.
            EngineError: a stage failed, or an actor died.
        """
        if self._graph is None:
            raise EngineError("the pipeline is closed", hint="make another one")
        self._signature.check(inputs)
        waiting: collections.deque[Any] = collections.deque()
        found: list[Values] = []
        with _translated():
            try:
                for piece in self._cutter.cut(inputs):
                    if len(waiting) == IN_FLIGHT:
                        found.append(self._got(waiting.popleft()))
                    waiting.append(self._graph.execute(dict(piece)))
                while waiting:
                    found.append(self._got(waiting.popleft()))
            finally:
                _drop(waiting, self._timeout_s)
        return self._cutter.join([{name: piece[name] for name in self._plan.outputs} for piece in found])

    def close(self) -> None:
        """Ends the actors, and a Ray that was started here."""
        import ray

        graph, self._graph = self._graph, None
        if graph is None:
            return
        graph.teardown()
        for actor in self._actors:
            ray.kill(actor)
        if self._own:
            ray.shutdown()

    def __enter__(self) -> RayPipeline:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _compiled(self, bundle: str, name: str, needs: Sequence[Mapping[str, Any]]) -> tuple[list[Any], Any]:
        import ray
        from ray.dag import InputNode

        kind = ray.remote(StageActor)
        actors = [kind.options(**need).remote(bundle, name, number) for number, need in enumerate(needs)]
        with _translated():
            ray.get([actor.ready.remote() for actor in actors], timeout=self._timeout_s)
            with InputNode() as first:
                node: Any = first
                for actor in actors:
                    node = actor.run.bind(node)
            return actors, node.experimental_compile(_max_inflight_executions=IN_FLIGHT)

    def _got(self, reference: Any) -> Values:
        import ray

        values: Values = ray.get(reference, timeout=self._timeout_s)
        # Arrays of a channel are views of its memory, which the next micro-batch overwrites.
        return {key: np.array(value) for key, value in values.items()}


def check_ray() -> None:
    """Raises TargetUnavailableError where Ray is not installed."""
    require_ray("ray.dag", "a pipeline over machines", "load() runs the stages in one process")


def _engine(bundle: Path, engine: str | None) -> str:
    from ...compiler.engine import named, read_manifest

    manifest = read_manifest(bundle)
    names = [record["name"] for record in manifest["engines"] if record["target"] == "pipeline"]
    if engine is None and names:
        engine = names[0]
    if engine is None or named(manifest, engine)["target"] != "pipeline":
        raise UsageError(
            f"{bundle} has no such engine of stages",
            expected=", ".join(names) or "an engine of target pipeline",
            found=engine or ", ".join(record["name"] for record in manifest["engines"]),
            hint="compile it with --stages 2",
        )
    return engine


def _needs(info: EngineInfo, stages: int, resources: Sequence[Mapping[str, Any]] | None) -> Sequence[Mapping[str, Any]]:
    from .. import get_target

    on_gpu = "cpu" not in get_target(info.target, info.options).capabilities.devices
    given = resources or [{"num_gpus": 1} if on_gpu else {"num_cpus": 1}]
    if len(given) not in (1, stages):
        raise UsageError("resources do not fit the stages", expected=f"{stages}, or one for all", found=len(given))
    return given if len(given) == stages else list(given) * stages


def _drop(waiting: collections.deque[Any], timeout_s: float) -> None:
    """Takes what is under way out of the graph after a failure: its places are needed for the next call."""
    import ray

    while waiting:
        with contextlib.suppress(ray.exceptions.RayError, EngineError):
            ray.get(waiting.popleft(), timeout=timeout_s)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turns what Ray raises into EngineError; a stage's own error comes through as what it says."""
    import ray.exceptions

    try:
        yield
    except ray.exceptions.RayError as error:
        if isinstance(cause := getattr(error, "cause", None), EngineError):
            raise cause from error
        hint = "close the pipeline and make another"
        raise EngineError("a stage failed in Ray", found=reason(error), hint=hint) from error
