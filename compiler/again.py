"""Judges and measures the engines of a finished bundle again, on this machine or on new data."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EngineError, TargetUnavailableError, UnknownNameError, UsageError
from ..targets import get_target, parse_target
from ..targets.base import EngineInfo
from .bundle import Bundle
from .data import open_data
from .engine import check_files
from .extensions import is_own
from .manifest import BatchCurve, Benchmark, EngineRecord, OutputMetrics, Validation
from .progress import Progress
from .ranking import objective_of
from .recipe import Recipe, make_recipe, read_recipe
from .signature import Signature
from .trial import TORCH_BASELINES, benchmark_engines, load, validate_engines
from .validation.reference import ReferenceOutputs


def validate_bundle(
    path: Path, engines: Sequence[str] = (), *, progress: Progress | None = None, **fields: Any
) -> list[Validation]:
    """Judges the engines of a bundle again: on its own record of the reference, or on new data with the model.

    Args:
        engines: names of the engines to judge; all that run here and are not dropped where empty.
        fields: `data`, `metric`, `tolerances`, `max_samples` of the recipe.

    Raises:
        TargetUnavailableError: no engine that was asked for runs here.
    """
    from .validation.validator import noise_floor

    bundle, recipe = _reopen(path, fields)
    chosen = _choose(bundle, engines)
    signature = Signature.from_json(bundle.manifest["signature"])
    with tempfile.TemporaryDirectory(prefix="enginesmith-") as scratch:
        floor: tuple[str, list[OutputMetrics]] = ("", [])
        if "data" in fields:
            model = load(recipe)
            data = open_data(recipe.data, model.signature, seed=recipe.seed)
            reference = ReferenceOutputs.record(model, data.labelled(), Path(scratch), max_samples=recipe.max_samples)
            floor = noise_floor(reference, model, None)
        else:
            floor = _stored_floor(bundle)
            reference = ReferenceOutputs(path / "reference", signature, max_samples=recipe.max_samples)
        validate_engines(path, chosen, reference, floor, recipe, (progress or Progress()).update, save=False)
    return [_judged(engine) for engine in chosen]


def _stored_floor(bundle: Bundle) -> tuple[str, list[OutputMetrics]]:
    """The noise floor that was found when the bundle was made, one for all its engines."""
    validations = [v for engine in bundle.manifest["engines"] if (v := engine["validation"])]
    return (validations[0]["noise_floor_of"], validations[0]["noise_floor"]) if validations else ("", [])


def benchmark_bundle(
    path: Path, engines: Sequence[str] = (), *, progress: Progress | None = None, **fields: Any
) -> Benchmark:
    """Measures the engines of a bundle again.

    Args:
        engines: names of the engines to measure; all that run here and are not dropped where empty.
        fields: `baselines`, `data`, `rounds`, `slice_s`, `with_transfers`, `seed` of the recipe.

    Raises:
        TargetUnavailableError: no engine that was asked for runs here.
        EngineError: every candidate failed.
    """
    bundle, recipe = _reopen(path, fields)
    if engines:
        names = {record["name"] for record in bundle.manifest["engines"]}
        engines = list(dict.fromkeys([*engines, *(name for name in recipe.baselines if name in names)]))
    chosen = _choose(bundle, engines)
    signature = Signature.from_json(bundle.manifest["signature"])
    sample = _sample(bundle, recipe, signature, given="data" in fields)
    in_torch = any(name in TORCH_BASELINES for name in recipe.baselines)
    from_file = bundle.manifest["source"]["kind"] != "onnx" and not recipe.model.startswith("<")
    model = load(recipe) if in_torch and from_file else None
    update = (progress or Progress()).update
    result = benchmark_engines(path, chosen, sample, signature, recipe, model, update)
    if result is None or not result["timings"]:
        reasons = result["skipped"] if result else {}
        raise EngineError("nothing could be measured", found="; ".join(f"{k}: {v}" for k, v in reasons.items()))
    return result


def search_bundle(
    path: Path, engines: Sequence[str] = (), *, progress: Progress | None = None, **fields: Any
) -> list[BatchCurve]:
    """Searches batch sizes of engines of a bundle.

    Args:
        engines: names of the engines; the best of each target that runs here where empty.
        fields: `p99`, `max_batch`, `data`, `rounds`, `slice_s`, `with_transfers`, `seed` of the recipe.

    Raises:
        UsageError: a baseline was given.
        RecipeError: the engines have no batch axis.
        TargetUnavailableError: no engine that was asked for runs here.
        EngineError: no engine runs at any batch size.
    """
    from .batch.search import best_of_targets, check_searchable, search_batches

    if "baselines" in fields:
        raise UsageError("a batch search compares the sizes of an engine, and has no baseline", hint="leave it out")
    bundle, recipe = _reopen(path, {"p99": None, "max_batch": None, **fields})
    signature = Signature.from_json(bundle.manifest["signature"])
    check_searchable(signature, recipe)
    chosen = _choose(bundle, engines)
    if not engines:
        wrong = {e["name"] for e in bundle.manifest["engines"] if (v := e["validation"]) and not v["passed"]}
        right = [engine for engine in chosen if engine["name"] not in wrong]
        objective = objective_of(bundle.manifest.get("ladder"))
        chosen = best_of_targets(right, bundle.manifest["benchmark"], signature, objective)
    sample = _sample(bundle, recipe, signature, given="data" in fields)
    curves = search_batches(path, chosen, sample, signature, recipe, (progress or Progress()).update)
    if not any(curve["largest"] for curve in curves):
        reasons = "; ".join(f"{curve['engine']}: {curve['points'][0]['reason']}" for curve in curves)
        raise EngineError("no engine runs at any batch size that was searched", found=reasons or "no engine is right")
    return curves


def _sample(bundle: Bundle, recipe: Recipe, signature: Signature, *, given: bool) -> Mapping[str, np.ndarray]:
    """Inputs to measure with: of the data that were given now, else of the record of the reference."""
    if given:
        return open_data(recipe.data, signature, seed=recipe.seed).first()
    return next(iter(ReferenceOutputs(bundle.path / "reference", signature))).inputs


def _reopen(path: Path, fields: Mapping[str, Any]) -> tuple[Bundle, Recipe]:
    bundle = Bundle.open(path)
    recipe = read_recipe(path / "recipe.yaml")
    find_own(recipe.targets)
    return bundle, make_recipe({**recipe.model_dump(), **fields}, "call")


def find_own(targets: Sequence[str]) -> None:
    """Loads the user's targets of a recipe, so that engines find them by name. Like its metric, their code runs."""
    for text in targets:
        if is_own(text):
            parse_target(text)


def _choose(bundle: Bundle, names: Sequence[str]) -> list[EngineRecord]:
    """Copies of the records of the engines that were asked for, ready where they run on this machine."""
    records = bundle.manifest["engines"]
    for name in names:
        if name not in {record["name"] for record in records}:
            raise UnknownNameError("engine", name, [record["name"] for record in records])
    chosen, reasons = [], []
    for record in records:
        if (names and record["name"] not in names) or record["status"] not in ("ready", "built"):
            continue
        if not names and record.get("dropped"):
            continue
        check_files(bundle.path, record["name"], bundle.manifest)
        info = EngineInfo.read(bundle.path / "engines" / record["name"])
        state = get_target(info.target, info.options).availability()
        if state.run:
            chosen.append(
                EngineRecord(**{"sibling": None, "dropped": "", **record, "status": "ready", "validation": None})
            )
        else:
            reasons.append(f"{record['name']}: {state.reason}")
    if not chosen or (names and reasons):
        raise TargetUnavailableError(
            f"no engine of {str(bundle.path)!r} {'that was asked for ' if names else ''}runs here",
            found="; ".join(reasons) or "none was built",
        )
    return chosen


def _judged(engine: EngineRecord) -> Validation:
    """The validation of an engine; one that does not load any more is an error, not a verdict."""
    if engine["validation"] is None:
        raise TargetUnavailableError(f"engine {engine['name']!r} cannot be judged", found=engine["reason"])
    return engine["validation"]
