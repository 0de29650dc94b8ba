"""Takes an engine from the cache that was built before, here or on another machine, or builds it and keeps it there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EngineError
from ..targets.base import Availability, BuildRequest, EngineInfo, Target
from .extensions import code_of
from .storage.cache import code_digest, key
from .storage.fingerprint import is_repeatable
from .storage.memory import release
from .trial import calibration_of

if TYPE_CHECKING:
    from .build import Job
    from .calibration import Calibration
    from .data import Data
    from .graph import Graph
    from .sources import Model


def build_or_reuse(
    job: Job,
    target: Target,
    precision: str,
    graph: Graph | None,
    model: Model,
    data: Data,
    directory: Path,
    log: list[str],
    state: Availability,
) -> tuple[EngineInfo, bool]:
    """The engine, in `directory`, and whether it was built before.

    While one process builds an engine, others that need the same one wait for it.
    """
    by_module = target.capabilities.consumes == "module"
    calibration = None
    if precision in target.capabilities.calibrated:
        calibration = calibration_of(job.recipe, model.signature, data, job.cache)
    request = BuildRequest(
        graph=None if by_module else graph,
        model=model,
        signature=model.signature,
        precision=precision,
        sample=data.first(),
        directory=directory,
        cache=job.cache.folder("builders"),
        log=log.append,
        progress=job.stages.update,
        timeout_s=job.recipe.timeout_s,
        calibration=calibration.limited() if calibration else None,
    )
    if calibration is not None and not is_repeatable(job.recipe):
        return target.build(request), False
    engine_key = _key(job, target, request, state, calibration)
    if info := _reused(job, target, engine_key, request, state):
        return info, True

    def waiting(holder: str) -> None:
        log.append(f"waits for {holder}, which builds the same engine")
        job.stages.update(0.0, f"{directory.name}: waits for {holder}, which builds it")

    with job.cache.making("engines", engine_key, wait_s=job.recipe.timeout_s, waiting=waiting) as waited:
        if waited and (info := _reused(job, target, engine_key, request, state)):
            return info, True
        info = target.build(request)
        release()
        info.write(directory)
        what = {"model": described(job.recipe.model), "target": str(target), "precision": precision}
        job.cache.put("engines", engine_key, directory, what=what, notes={"machine": key(job.machine)})
    return info, False


def described(model: str) -> str:
    """A model for people: without the folders that it lies in."""
    return model.replace("\\", "/").rpartition("/")[2]


def _key(job: Job, target: Target, request: BuildRequest, state: Availability, calibration: Calibration | None) -> str:
    """All that decides the engine. Of the machine, only what its target says."""
    facts = target.built_for()
    everything: dict[str, Any] = {"machine": job.machine, "versions": state.versions}
    return key(
        {
            "source": request.model.fingerprint if request.graph is None else request.graph.fingerprint(),
            "signature": request.signature.to_json(),
            "target": [target.name, target.options(), request.precision],
            "built_for": everything if facts is None else facts,
            "code": [code_digest(), code_of(target.source)],
            **({"calibration": calibration.key} if calibration else {}),
        }
    )


def _reused(job: Job, target: Target, engine_key: str, request: BuildRequest, state: Availability) -> EngineInfo | None:
    """The engine from the cache, copied to the request's folder; None where there is none that works here."""
    directory = request.directory
    with job.cache.reading("engines", engine_key) as kept:
        if kept is None:
            return None
        shutil.copytree(kept.content, directory, dirs_exist_ok=True)
        here = kept.notes.get("machine") == key(job.machine)
    info = EngineInfo.read(directory)
    if here:
        request.log("taken from the cache: same graph, options, versions and machine")
        return info
    try:
        info = _tried(target, info, request, state)
    except EngineError as error:
        request.log(f"one in the cache, from another machine, does not work here: {error.message}")
        shutil.rmtree(directory)
        directory.mkdir()
        return None
    request.log("taken from the cache: same graph and options, built on another machine")
    return info


def _tried(target: Target, info: EngineInfo, request: BuildRequest, state: Availability) -> EngineInfo:
    """Runs an engine of another machine once, where this one can, and describes it anew.

    Raises:
        EngineError: it does not run here.
    """
    info = target.describe(info, request)
    info.write(request.directory)
    if state.run:
        runner = target.runner(request.directory, info)
        try:
            runner.run(request.sample)
        finally:
            runner.close()
        release()
    return info
