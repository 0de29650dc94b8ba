"""The whole compile, read top to bottom: a model becomes a bundle of engines that were judged and measured."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import (
    BuildError,
    CaptureError,
    EnginesmithError,
    RecipeError,
    TargetUnavailableError,
    UnknownNameError,
)
from ..passes import parse_pass
from ..passes.base import Context, Pass
from ..targets import parse_target
from ..targets.base import Availability, BuildRequest, EngineInfo, Target
from .bundle import Bundle, write_bundle, write_reproduction
from .data import Data, describe, open_data
from .machine.environment import environment
from .manifest import FORMAT, Benchmark, CaptureRecord, EngineRecord, Manifest, PassRecord
from .progress import Progress, Stages
from .recipe import Recipe, make_recipe, read_recipe
from .storage.cache import Cache, key
from .storage.files import appearing_folder, copy_tree, size_bytes
from .storage.fingerprint import compile_key, is_self_contained, local_modules, still_hold
from .storage.memory import release
from .trial import TORCH_BASELINES, benchmark_engines, load, validate_engines, verdict
from .validation.reference import ReferenceOutputs

if TYPE_CHECKING:
    import torch

    from .capture import Captured
    from .graph import Graph
    from .sources import Model

STAGES = 9


@dataclasses.dataclass(frozen=True)
class Job:
    """What all stages of one compile share. `folder` becomes the bundle, `scratch` is gone afterwards."""

    recipe: Recipe
    targets: tuple[Target, ...]
    passes: tuple[Pass, ...]
    casts: Mapping[str, Pass]
    machine: Mapping[str, Any]
    cache: Cache
    folder: Path
    scratch: Path
    stages: Stages

    def needs_model(self, captured: Captured) -> bool:
        """Whether the model runs again after the reference was recorded."""
        in_torch = self.recipe.benchmark and any(name in TORCH_BASELINES for name in self.recipe.baselines)
        return in_torch or captured.graph is None or any(t.capabilities.consumes == "module" for t in self.targets)


def compile(
    source: str | Path | torch.nn.Module | None = None,
    output: str | Path = "build/bundle",
    *,
    recipe: Recipe | str | Path | None = None,
    progress: Progress | None = None,
    **fields: Any,
) -> Bundle:
    """Compiles a model to a bundle of validated, measured engines.

    Args:
        source: what `Recipe.model` takes, or a torch module.
        output: folder of the bundle; it appears whole, or not at all.
        recipe: a recipe or its file; `fields` take the place of the recipe's.
        fields: the fields of `Recipe`.

    Raises:
        UsageError: a recipe, option, data or output folder that will not do.
        ModelError: the model could not be loaded or captured.
        EngineError: no engine could be built, or a required one could not.
    """
    module = None if source is None or isinstance(source, (str, Path)) else source
    if source is not None:
        fields["model"] = str(source) if module is None else f"<{type(module).__name__}>"
    if isinstance(recipe, Recipe):
        recipe = make_recipe({**recipe.model_dump(), **fields})
    else:
        recipe = read_recipe(Path(recipe), fields) if recipe else make_recipe(fields, "call")
    if not recipe.model or (recipe.model.startswith("<") and module is None):
        raise RecipeError(
            "the recipe names no model that can be loaded",
            expected="file.py:factory, TorchScript archive, .pt2 program or ONNX file",
            found=recipe.model or "nothing",
            hint="a module that was given in Python must be given again",
        )
    return _compile(_resolve(recipe), Path(output), module, progress or Progress())


def _compile(recipe: Recipe, output: Path, module: torch.nn.Module | None, progress: Progress) -> Bundle:
    """The stages. Every name and option is checked before any work starts."""
    targets = tuple(parse_target(text) for text in recipe.targets)
    _check_names(recipe, targets)
    machine, cache = environment(), Cache()
    bundle_key = compile_key(recipe, machine)
    from_files = module is None and is_self_contained(recipe)
    if from_files and (kept := _unchanged(cache, bundle_key)):
        with appearing_folder(output) as folder:
            return _copied(kept, folder, output)
    passes = tuple(parse_pass(text) for text in recipe.passes if text != "none")
    casts = {precision: parse_pass(f"cast:to={precision}") for precision in recipe.precisions if precision != "fp32"}
    stages = Stages(progress, STAGES)
    with appearing_folder(output) as folder, tempfile.TemporaryDirectory(prefix="enginesmith-") as scratch:
        job = Job(recipe, targets, passes, casts, machine, cache, folder, Path(scratch), stages)
        known_modules = set(sys.modules)
        with stages("load model") as stage:
            model = load(recipe, module)
            stage["detail"] = f"{model.kind}, {model.parameter_bytes / 1e6:.1f} MB of weights"
        if not from_files:
            bundle_key = compile_key(recipe, machine, model.fingerprint)
            if kept := _unchanged(cache, bundle_key):
                return _copied(kept, folder, output)

        with stages("read data") as stage:
            data = open_data(recipe.data, model.signature, seed=recipe.seed)
            stage["detail"] = data.description
        with stages("run reference") as stage:
            reference = ReferenceOutputs.record(
                model, data.labelled(), _made(job.scratch / "reference"), max_samples=recipe.max_samples
            )
            stage["detail"] = reference.description
        with stages("capture graph") as stage:
            captured = _capture(job, model, data)
            stage["detail"] = captured.record["exporter"] or "no exporter succeeded"
        if not job.needs_model(captured):
            model = model.without_weights()
            release()
        with stages("run passes"):
            graphs, pass_records = _run_passes(job, captured, model, data)
        with stages("build engines") as stage:
            engines = _build_all(job, graphs, captured.record, model, data)
            built = [engine for engine in engines if engine["status"] in ("ready", "built")]
            stage["detail"] = f"{len(built)} of {len(engines)}"
        with stages("validate") as stage:
            stage["detail"] = _validate(job, model, captured, reference, engines)
        with stages("benchmark") as stage:
            benchmark = _benchmark(job, model, data, engines)
            stage["detail"] = f"against {benchmark['baseline']}" if benchmark else "nothing to measure"
        with stages("write bundle"):
            manifest = Manifest(
                format=FORMAT,
                enginesmith=__version__,
                created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                verdict=verdict(engines, benchmark, model.signature),
                source=_describe(recipe, model),
                signature=model.signature.to_json(),
                data=describe(data),
                seed=recipe.seed,
                capture=captured.record,
                stages=stages.records,
                passes=pass_records,
                engines=engines,
                benchmark=benchmark,
                environment=dict(job.machine),
                files={},
            )
            write_bundle(folder, manifest, recipe)
        if all(engine["status"] != "failed" for engine in engines):
            job.cache.put("bundles", bundle_key, folder, notes=local_modules(known_modules))
    return Bundle(output, manifest)


def _resolve(recipe: Recipe) -> Recipe:
    """Fills in what depends on the machine, and makes paths absolute, so that the recipe in the bundle says it all."""
    targets = recipe.targets
    if not targets:
        on_gpu = [name for name in ("onnxruntime-cuda", "tensorrt") if parse_target(name).availability().run]
        targets = tuple(on_gpu) or ("onnxruntime-cpu",)
    paths = {
        name: str(Path(value).resolve())
        for name in ("model", "weights", "data", "metric")
        if (value := getattr(recipe, name)) and not value.startswith("<")
    }
    return make_recipe({**recipe.model_dump(), **paths, "targets": targets})


def _check_names(recipe: Recipe, targets: tuple[Target, ...]) -> None:
    """Fails before any work where a required target was not asked for or cannot be built here.

    A baseline that does not exist fails here too.
    """
    names = [f"{target.name}-{precision}" for target in targets for precision in recipe.precisions]
    for baseline in recipe.baselines:
        if baseline not in (*TORCH_BASELINES, *names):
            raise UnknownNameError("baseline", baseline, [*TORCH_BASELINES, *names])
    for name in recipe.require:
        target = next((t for t in targets if t.name == name), None)
        if target is None:
            raise RecipeError(f"required target {name!r} is not among the targets", found=", ".join(recipe.targets))
        state = target.availability()
        if not state.build:
            raise _unavailable(target, state)


def _unavailable(target: Target, state: Availability) -> TargetUnavailableError:
    return TargetUnavailableError(
        f"target {target.name!r} is not available: {state.reason}", hint=state.install or None
    )


def _unchanged(cache: Cache, bundle_key: str) -> Path | None:
    """The bundle of this compile in the cache, where nothing changed since."""
    kept = cache.get("bundles", bundle_key)
    return kept if kept and still_hold(cache.notes("bundles", bundle_key)) else None


def _copied(kept: Path, folder: Path, output: Path) -> Bundle:
    """Fills the folder that will appear at `output` from the cache."""
    folder.rmdir()
    copy_tree(kept, folder)
    return Bundle(output, Bundle.open(folder).manifest, cached=True)


def _capture(job: Job, model: Model, data: Data) -> Captured:
    """Captures the graph in the highest opset that every target takes."""
    from .capture import capture

    ranges = [opset for target in job.targets if (opset := target.opset_range())]
    lowest, highest = max((low for low, _ in ranges), default=9), min((high for _, high in ranges), default=20)
    log: list[str] = []
    captured = capture(
        model,
        exporter=job.recipe.exporter,
        opset=job.recipe.opset,
        opset_range=(lowest, highest),
        samples=data,
        seed=job.recipe.seed,
        directory=_made(job.scratch / "export"),
        log=log.append,
    )
    (job.folder / "capture.log").write_text("\n".join(log) + "\n")
    if captured.graph is None and all(target.capabilities.consumes == "graph" for target in job.targets):
        reasons = "; ".join(f"{a['exporter']}: {a['reason']}" for a in captured.record["attempts"])
        raise CaptureError(
            "the model could not be captured as a graph",
            found=reasons,
            hint="targets torchscript and torch-inductor need no graph",
        )
    return captured


def _run_passes(job: Job, captured: Captured, model: Model, data: Data) -> tuple[dict[str, Graph], list[PassRecord]]:
    """The graph of every precision: the recipe's passes once, then the cast where the precision asks for one."""
    if captured.graph is None:
        return {}, []
    context = Context(model.signature, data)
    records = [_run_pass(rewrite, captured.graph, context, "all") for rewrite in job.passes]
    graphs = {}
    for precision in job.recipe.precisions:
        graphs[precision] = captured.graph.clone()
        if precision in job.casts:
            records.append(_run_pass(job.casts[precision], graphs[precision], context, precision))
    return graphs, records


def _run_pass(rewrite: Pass, graph: Graph, context: Context, variant: str) -> PassRecord:
    before, start = sum(1 for _ in graph.nodes()), time.perf_counter()
    result = rewrite(graph, context)
    release()
    return PassRecord(
        variant=variant,
        text=str(rewrite),
        seconds=time.perf_counter() - start,
        modified=result.modified,
        changes=dict(result.changes),
        refusals=[dataclasses.asdict(refusal) for refusal in result.refusals],
        nodes_before=before,
        nodes_after=sum(1 for _ in graph.nodes()),
    )


def _build_all(
    job: Job, graphs: Mapping[str, Graph], capture: CaptureRecord, model: Model, data: Data
) -> list[EngineRecord]:
    """Builds every target in every precision; one that fails leaves its reason and lets the others go on.

    Raises:
        BuildError: a required engine failed, or none was built.
    """
    variants = [(target, precision) for target in job.targets for precision in job.recipe.precisions]
    engines: list[EngineRecord] = []
    for number, (target, precision) in enumerate(variants):
        job.stages.update(number / len(variants), f"{target.name} {precision}")
        name = f"{target.name}-{precision}"
        same = sum(engine["name"].startswith(name) for engine in engines)  # one target twice, with other options
        name += f"-{same + 1}" if same else ""
        engines.append(_build(job, name, target, precision, graphs.get(precision), capture, model, data))
    failed = [engine for engine in engines if engine["status"] in ("failed", "unavailable")]
    required = [engine for engine in failed if engine["target"] in job.recipe.require]
    if required or len(failed) == len(engines):
        worst = (required or failed)[0]
        raise BuildError(
            f"required engine {worst['name']!r} could not be built" if required else "no engine could be built",
            found="; ".join(f"{engine['name']}: {engine['reason']}" for engine in required or failed),
            hint=worst["to_do"] or None,
        )
    return engines


def _build(
    job: Job,
    name: str,
    target: Target,
    precision: str,
    graph: Graph | None,
    capture: CaptureRecord,
    model: Model,
    data: Data,
) -> EngineRecord:
    record = EngineRecord(
        name=name,
        target=target.name,
        precision=precision,
        status="unavailable",
        reason="",
        to_do="",
        build_s=None,
        size_bytes=0,
        cached=False,
        details={},
        validation=None,
    )
    state = target.availability()
    if not state.build:
        record.update({"reason": state.reason, "to_do": state.install})
        return record
    if problem := _mismatch(target, precision, graph, capture):
        record.update({"status": "failed", "reason": problem})
        return record
    directory = job.folder / "engines" / name
    directory.mkdir(parents=True)
    log: list[str] = []
    start = time.perf_counter()
    try:
        info, record["cached"] = _build_or_reuse(job, target, precision, graph, model, data, directory, log, state)
    except Exception as error:  # noqa: BLE001  the step boundary: one engine's failure must not take the others along
        known = isinstance(error, EnginesmithError)
        log.extend(traceback.format_exc().splitlines())
        record.update(
            {"status": "failed", "reason": str(error) if known else f"internal error, {type(error).__name__}: {error}"}
        )
        record["to_do"] = f"see engines/{name}/build.log"
        write_reproduction(directory, str(target), precision, log)
        return record
    (directory / "engine.json").unlink()  # it may be a link to the cache's
    dataclasses.replace(info, name=name).write(directory)
    write_reproduction(directory, str(target), precision, log)
    record.update(
        {
            "status": "ready" if state.run else "built",
            "reason": state.reason,
            "to_do": state.install,
            "build_s": time.perf_counter() - start,
            "size_bytes": size_bytes(directory),
            "details": dict(info.details),
        }
    )
    return record


def _mismatch(target: Target, precision: str, graph: Graph | None, capture: CaptureRecord) -> str:
    """Why the target cannot take this variant; empty where it can."""
    if precision not in target.capabilities.precisions:
        return f"no engines of precision {precision}; it builds {', '.join(target.capabilities.precisions)}"
    if target.capabilities.consumes == "module":
        return ""
    if graph is None:
        return "no graph: " + "; ".join(f"{a['exporter']}: {a['reason']}" for a in capture["attempts"])
    low, high = target.opset_range() or (1, sys.maxsize)
    if not low <= graph.opset <= high:
        return f"the graph has opset {graph.opset}; the target takes {low} to {high}"
    return ""


def _build_or_reuse(
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
    """Builds an engine, or takes the one that was built before from the same graph by the same versions."""
    by_module = target.capabilities.consumes == "module"
    engine_key = key(
        {
            "source": model.fingerprint if by_module or graph is None else graph.fingerprint(),
            "signature": model.signature.to_json(),
            "target": [target.name, target.options(), precision],
            "versions": state.versions,
            "machine": job.machine,
        }
    )
    if kept := job.cache.get("engines", engine_key):
        log.append("taken from the cache: same graph, options, versions and machine")
        directory.rmdir()
        copy_tree(kept, directory)
        return EngineInfo.read(directory), True
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
    )
    info = target.build(request)
    release()
    info.write(directory)
    job.cache.put("engines", engine_key, directory)
    return info, False


def _validate(
    job: Job, model: Model, captured: Captured, reference: ReferenceOutputs, engines: list[EngineRecord]
) -> str:
    """Judges every engine that runs here on the record of the reference, and says on what."""
    from .validation.validator import noise_floor

    floor = noise_floor(reference, model, captured.path)
    release()
    validate_engines(job.folder, engines, reference, floor, job.recipe, job.stages.update, save=True)
    reference.save(_made(job.folder / "reference"))
    return reference.description


def _benchmark(job: Job, model: Model, data: Data, engines: list[EngineRecord]) -> Benchmark | None:
    if not job.recipe.benchmark:
        return None
    sample = data.first()
    return benchmark_engines(job.folder, engines, sample, model.signature, job.recipe, model, job.stages.update)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _describe(recipe: Recipe, model: Model) -> dict[str, Any]:
    return {
        "kind": model.kind,
        "model": recipe.model,
        "weights": recipe.weights,
        "fingerprint": model.fingerprint,
        "parameter_bytes": model.parameter_bytes,
    }
