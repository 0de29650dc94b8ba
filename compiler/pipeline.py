"""The whole compile, read top to bottom: a model becomes a bundle of engines that were judged and measured."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import CaptureError, RecipeError, TargetUnavailableError, UnknownNameError
from ..passes import parse_pass
from ..targets import parse_target
from ..targets.base import Target
from ..targets.pipeline import all_staged
from .batch.choice import missed
from .batch.search import best_of_targets, check_searchable, search_batches
from .batch.search import notes as batch_notes
from .build import Job, build_all, check_left
from .bundle import Bundle, check_output, write_bundle
from .data import Data, describe, open_data
from .extensions import anchored
from .gains import drop
from .ladder.climb import climb
from .ladder.trials import Evidence
from .machine.environment import environment
from .manifest import FORMAT, BatchCurve, Benchmark, EngineRecord, Ladder, Manifest, OutputMetrics, Roofline
from .progress import Progress, Stages
from .pruning.module import check_module, check_pruned_weights
from .ranking import objective_of
from .recipe import PATHS, Recipe, make_recipe, read_recipe
from .reuse import described
from .rewriting import calibrated, run_passes, workshop
from .storage.cache import Cache
from .storage.files import appearing_folder
from .storage.fingerprint import compile_key, is_repeatable, is_self_contained, local_modules, still_hold
from .storage.memory import release
from .text import keep_text
from .trial import (
    TORCH_BASELINES,
    benchmark_engines,
    load,
    load_budget,
    load_metric,
    try_metric,
    validate_engines,
    verdict,
)
from .validation.reference import ReferenceOutputs
from .variants import Variant, calibrates, make_variants, not_lowered, not_written, without_effect

if TYPE_CHECKING:
    import torch

    from .capture import Captured
    from .graph import Graph
    from .sources import Model

STAGES = 9
"""One more where the ladder runs, and one where batch sizes are searched."""


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
    check_output(output)
    known_modules = set(sys.modules)
    named = tuple(map(parse_target, recipe.targets))
    targets = all_staged(named, recipe.stages, recipe.stage_devices, recipe.micro_batch)
    variants = make_variants(recipe, targets)
    _check_names(recipe, targets, [variant.name for variant in variants])
    _check_calibration(recipe, variants)
    check_pruned_weights(recipe)
    machine, cache = environment(), Cache()
    bundle_key = compile_key(recipe, machine)
    from_files = module is None and is_self_contained(recipe) and is_repeatable(recipe)
    if from_files:
        with cache.reading("bundles", bundle_key) as kept:
            if kept and still_hold(kept.notes):
                with appearing_folder(output) as folder:
                    return _copied(kept.content, folder, output)
    passes = tuple(parse_pass(text) for text in recipe.passes if text != "none")
    load_metric(recipe)  # a metric that is not there fails before any work
    load_budget(recipe)
    stages = Stages(progress, STAGES + recipe.climbs + recipe.searches_batches + recipe.explains)
    with appearing_folder(output) as folder, tempfile.TemporaryDirectory(prefix="enginesmith-") as scratch:
        job = Job(recipe, targets, passes, variants, machine, cache, folder, Path(scratch), stages)
        with stages("load model") as stage:
            model = load(recipe, module)
            stage["detail"] = f"{model.kind}, {model.parameter_bytes / 1e6:.1f} MB of weights"
        if recipe.searches_batches:
            check_searchable(model.signature, recipe)
        check_module(recipe, model)
        if not from_files:
            bundle_key = compile_key(recipe, machine, model.fingerprint)
            with cache.reading("bundles", bundle_key) as kept:
                if kept and is_repeatable(recipe) and still_hold(kept.notes):
                    return _copied(kept.content, folder, output)

        with stages("read data") as stage:
            data = open_data(recipe.data, model.signature, seed=recipe.seed)
            stage["detail"] = data.description
        with stages("run reference") as stage:
            reference = ReferenceOutputs.record(
                model, data.labelled(), _made(job.scratch / "reference"), max_samples=recipe.max_samples
            )
            stage["detail"] = reference.description
        try_metric(recipe, reference)
        with stages("capture graph") as stage:
            captured = _capture(job, model, data)
            stage["detail"] = captured.record["exporter"] or "no exporter succeeded"
        remaining = model if job.needs_model(captured) else model.without_weights()
        model = model if job.passes_need_model else remaining
        release()
        shop = workshop(job, model, data)
        as_captured = captured.graph.clone() if captured.graph and recipe.climbs else None
        with stages("run passes"):
            graphs, pass_records = run_passes(shop, captured.graph)
        calibration = shop.context.calibration
        climber = shop if recipe.climbs else None  # it holds the weights
        del shop
        model = remaining
        release()
        with stages("build engines") as stage:
            engines = build_all(job, graphs, captured.record, model, data)
            built = [engine for engine in engines if engine["status"] in ("ready", "built")]
            stage["detail"] = f"{len(built)} of {len(engines)}"
        floor = _noise_floor(reference, model, captured)
        ladder = None
        if climber:
            with stages("climb ladder") as stage:
                evidence = Evidence(captured.record, reference, floor)
                ladder, own, lowered = climb(climber, (as_captured, captured.graph), evidence, engines)
                graphs |= lowered
                pass_records, climber = [*pass_records, *own], None
                stays = sum(step["status"] == "kept" for step in ladder["steps"])
                stage["detail"] = f"{stays} of {len(ladder['steps'])} steps kept"
        with stages("validate") as stage:
            validate_engines(job.folder, engines, reference, floor, recipe, stages.update, save=True)
            reference.save(_made(job.folder / "reference"))
            stage["detail"] = reference.description
            check_left(engines, recipe.require)
        with stages("benchmark") as stage:
            benchmark = _benchmark(job, model, data, engines)
            drop(engines, benchmark, model.signature)
            stage["detail"] = f"against {benchmark['baseline']}" if benchmark else "nothing to measure"
        batches: list[BatchCurve] = []
        if recipe.searches_batches:
            with stages("search batch") as stage:
                chosen = best_of_targets(engines, benchmark, model.signature, objective_of(ladder))
                sample = data.first()
                batches = search_batches(folder, chosen, sample, model.signature, recipe, stages.update)
                stage["detail"] = ", ".join(engine["name"] for engine in chosen) or "no engine runs here"
        roofline = None
        if recipe.explains:
            with stages("roofline") as stage:
                roofline, stage["detail"] = _roofline(job, model, data, engines, benchmark, graphs, ladder)
        with stages("write bundle"):
            dense = [variant for variant in job.variants if variant.sibling is None]
            notes = [*not_lowered(dense, pass_records), *without_effect(job.variants, pass_records)]
            notes += not_written(pass_records) + batch_notes(batches)
            manifest = Manifest(
                format=FORMAT,
                enginesmith=__version__,
                created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                verdict=verdict(engines, benchmark, model.signature, notes, missed(batches), objective_of(ladder)),
                source=_describe(recipe, model),
                signature=model.signature.to_json(),
                data=describe(data),
                seed=recipe.seed,
                capture=captured.record,
                stages=stages.records,
                calibration=calibrated(calibration, folder) if captured.graph else [],
                passes=pass_records,
                engines=engines,
                benchmark=benchmark,
                ladder=ladder,
                batches=batches,
                roofline=roofline,
                environment=dict(job.machine),
                files={},
            )
            keep_text(model, folder)
            write_bundle(folder, manifest, recipe)
        if is_repeatable(recipe) and all(engine["status"] != "failed" for engine in engines):
            job.cache.put(
                "bundles", bundle_key, folder, what=_what(recipe, targets), notes=local_modules(known_modules)
            )
    return Bundle(output, manifest)


def _resolve(recipe: Recipe) -> Recipe:
    """Fills in what depends on the machine, and makes paths absolute, so that the recipe in the bundle says it all."""
    targets = recipe.targets
    if not targets:
        on_gpu = [name for name in ("onnxruntime-cuda", "tensorrt") if parse_target(name).availability().run]
        on_cpu = ("openvino",) if recipe.climbs and parse_target("openvino").availability().run else ()
        targets = tuple(on_gpu) or ("onnxruntime-cpu", *on_cpu)
    paths = {
        name: str(Path(value).resolve())
        for name in PATHS
        if (value := getattr(recipe, name)) and not value.startswith("<")
    }
    texts = {"passes": recipe.passes, "targets": targets}
    own = {name: tuple(anchored(text, Path.cwd()) for text in given) for name, given in texts.items()}
    return make_recipe({**recipe.model_dump(), **paths, **own})


def _check_names(recipe: Recipe, targets: Sequence[Target], names: Sequence[str]) -> None:
    """Fails before any work where a required target was not asked for or cannot be built here.

    A baseline that does not exist fails here too.
    """
    for baseline in recipe.baselines:
        if baseline not in (*TORCH_BASELINES, *names):
            raise UnknownNameError("baseline", baseline, [*TORCH_BASELINES, *names])
    for name in recipe.require:
        target = next((t for t in targets if t.name == name), None)
        if target is None:
            raise RecipeError(f"required target {name!r} is not among the targets", found=", ".join(recipe.targets))
        state = target.availability()
        if not state.build:
            raise TargetUnavailableError(
                f"target {name!r} is not available: {state.reason}", hint=state.install or None
            )


def _check_calibration(recipe: Recipe, variants: Sequence[Variant]) -> None:
    """Fails before any work where a precision or a step needs calibration data, and there are none."""
    if recipe.data or recipe.calibration_data or recipe.random_calibration:
        return
    for rewrite in (parse_pass(text) for text in recipe.passes if text != "none"):
        if rewrite.calibrates:
            raise _no_data(f"pass {rewrite}", "to see what tensors hold")
    for variant in variants:
        lowered = calibrates(variant.target, variant.precision, variant.lowering)
        if lowered or any(rewrite.calibrates for rewrite in variant.steps):
            who = f"precision {variant.precision!r}" if lowered else f"engine {variant.name!r}"
            why = "to see the ranges of activations" if lowered else "to see what its layers read"
            raise _no_data(who, why)


def _no_data(who: str, why: str) -> RecipeError:
    return RecipeError(
        f"{who} needs calibration data, {why}",
        hint="give --data with 32 to 512 real samples, or --random-calibration",
    )


def _what(recipe: Recipe, targets: Sequence[Target]) -> dict[str, str]:
    """What `cache list` says about a bundle."""
    names = ", ".join(map(str, targets))
    return {"model": described(recipe.model), "target": names, "precision": ", ".join(recipe.precisions)}


def _copied(kept: Path, folder: Path, output: Path) -> Bundle:
    """Fills the folder that will appear at `output` from the cache."""
    folder.rmdir()
    shutil.copytree(kept, folder)
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
        cache=job.cache,
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


def _noise_floor(reference: ReferenceOutputs, model: Model, captured: Captured) -> tuple[str, list[OutputMetrics]]:
    from .validation.validator import noise_floor

    floor = noise_floor(reference, model, captured.path)
    release()
    return floor


def _benchmark(job: Job, model: Model, data: Data, engines: list[EngineRecord]) -> Benchmark | None:
    if not job.recipe.benchmark:
        return None
    sample = data.first()
    return benchmark_engines(job.folder, engines, sample, model.signature, job.recipe, model, job.stages.update)


def _roofline(
    job: Job,
    model: Model,
    data: Data,
    engines: list[EngineRecord],
    benchmark: Benchmark | None,
    graphs: Mapping[str, Graph | str],
    ladder: Ladder | None,
) -> tuple[Roofline | None, str]:
    """Where the time of the best engine goes; None, with the reason, where that cannot be told."""
    from .diagnosis.roofline import roofline_of

    best = verdict(engines, benchmark, model.signature, objective=objective_of(ladder))["best"]
    record = next((engine for engine in engines if engine["name"] == best and engine["status"] == "ready"), None)
    if record is None:
        return None, "no engine runs here"
    graph, reasons = graphs.get(record["name"]), list[str]()
    known = None if isinstance(graph, str) else graph
    found = roofline_of(
        job.folder, record, model.signature, data.first(), job.cache, graph=known, ladder=ladder, log=reasons.append
    )
    return found, record["name"] if found else reasons[0]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _shown(path: str) -> str:
    """As the user would type it here: reports need not tell where a machine keeps its files."""
    return path.removeprefix(f"{Path.cwd()}/")


def _describe(recipe: Recipe, model: Model) -> dict[str, Any]:
    return {
        "kind": model.kind,
        "model": _shown(recipe.model),
        "weights": recipe.weights and _shown(recipe.weights),
        "fingerprint": model.fingerprint,
        "parameter_bytes": model.parameter_bytes,
    }
