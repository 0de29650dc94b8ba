"""Puts engines on trial: judged against the record of the reference, measured against the baselines, and a verdict."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EnginesmithError, RecipeError, UnknownNameError
from ..targets import get_target
from ..targets.base import EngineInfo, Runner
from . import gains
from .data import Data, open_data, resized
from .ladder.objective import LATENCY, Objective
from .manifest import Benchmark, EngineRecord, OutputMetrics, Timing
from .ranking import decisive, ranks
from .recipe import PERPLEXITY, Recipe
from .signature import Signature, parse_inputs
from .states import as_floats, in_the_middle
from .storage.cache import Cache
from .storage.fingerprint import is_repeatable
from .storage.memory import release
from .validation.metrics import resolve_tolerance
from .validation.reference import ReferenceOutputs

if TYPE_CHECKING:
    import torch

    from .benchmark import Candidate, SizedInputs
    from .budget import Budget
    from .calibration import Calibration
    from .sources import Model
    from .validation.validator import MetricFunction


TORCH_BASELINES = ("torch", "torch.compile")

SPENT = {"relative_l2": 0.5, "max_abs": 1.0, "cosine": 0.85, "top1": 0.9}
"""Bounds in their place where the user says what such an engine may cost: far from zeros and from swapped outputs."""


def load(recipe: Recipe, module: torch.nn.Module | None = None) -> Model:
    """Loads the model that a recipe names, or takes the module that was given in Python.

    Where the inputs are declared, the data are looked at first: what does not fit shows before anything long runs, and
    a model that refuses made-up inputs is described with real ones.
    """
    from .sources import load_model

    inputs = parse_inputs(recipe.inputs, recipe.dynamic) if recipe.inputs else None

    return load_model(
        module if module is not None else recipe.model,
        weights=Path(recipe.weights) if recipe.weights else None,
        inputs=inputs,
        dynamic=() if inputs else recipe.dynamic,
        arguments=recipe.arguments,
        device=recipe.reference_device,
        sample=open_data(recipe.data, inputs, seed=recipe.seed).first() if inputs and recipe.data else None,
        decoder=recipe.decoder,
    )


def open_runner(folder: Path, engine: EngineRecord) -> Runner:
    """Loads one engine of a bundle."""
    directory = folder / "engines" / engine["name"]
    info = EngineInfo.read(directory)
    runner = get_target(info.target, info.options).runner(directory, info)
    release()  # runtimes load a model by way of copies
    return runner


def validate_engines(
    folder: Path,
    engines: Sequence[EngineRecord],
    reference: ReferenceOutputs,
    floor: tuple[str, list[OutputMetrics]],
    recipe: Recipe,
    update: Callable[[float, str], None],
    *,
    save: bool,
) -> None:
    """Judges every engine that runs here, and notes the verdict in its record; one that does not load has failed.

    With `save`, Polygraphy's files of the results are left in the engine's folder.
    """
    from .validation.validator import validate

    metric = load_metric(recipe)
    budget = load_budget(recipe)
    ready = [engine for engine in engines if engine["status"] == "ready"]
    for number, engine in enumerate(ready):
        update(number / len(ready), engine["name"])
        directory = folder / "engines" / engine["name"]
        info = EngineInfo.read(directory)
        judged_as = gains.judged_as(info)
        spent = budget if judged_as != "fp32" else None
        try:
            runner = open_runner(folder, engine)
        except EnginesmithError as error:
            engine.update({"status": "failed", "reason": f"built, but it does not load: {error}"})
            continue
        try:
            engine["validation"] = validate(
                engine["name"],
                runner,
                reference,
                precision=judged_as,
                signature=as_floats(info.signature),
                tolerance=_tolerance(recipe, engine["precision"], spent, lossy=gains.is_lossy(engine)),
                floor=floor,
                metric=metric,
                budget=spent,
                directory=directory if save else None,
                seed=recipe.seed,
            )
        finally:
            runner.close()


def benchmark_engines(
    folder: Path,
    engines: Sequence[EngineRecord],
    sample: Mapping[str, np.ndarray],
    signature: Signature,
    recipe: Recipe,
    model: Model | None,
    update: Callable[[float, str], None],
) -> Benchmark | None:
    """Measures every engine that runs here against the baselines, interleaved; None where there is nothing to run."""
    from .benchmark import Candidate, Settings, benchmark

    runners = {
        engine["name"]: functools.partial(open_runner, folder, engine)
        for engine in engines
        if engine["status"] == "ready"
    }
    candidates, skipped = _baselines(folder, recipe, model, engines)
    candidates += [Candidate(name, runner) for name, runner in runners.items()]
    if not candidates:
        return None
    result = benchmark(
        candidates,
        sized_inputs(signature, sample),
        baseline=_baseline_name(recipe, candidates),
        protocol=Settings(
            rounds=recipe.rounds, slice_s=recipe.slice_s, transfers=recipe.with_transfers, seed=recipe.seed
        ),
        siblings={engine["name"]: engine["sibling"] for engine in engines if engine["sibling"]},
        on_progress=update,
    )
    result["skipped"].update(skipped)
    return result


def race(
    folder: Path,
    engines: Sequence[EngineRecord],
    sample: Mapping[str, np.ndarray],
    signature: Signature,
    recipe: Recipe,
    sizes: Mapping[str, int],
    update: Callable[[float, str], None],
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times engines at one size against the first of them, interleaved; by name, and why others could not be timed."""
    from .benchmark import Candidate, Settings, benchmark

    names = [engine["name"] for engine in engines]
    result = benchmark(
        [Candidate(engine["name"], functools.partial(open_runner, folder, engine)) for engine in engines],
        [sized(signature, sample, sizes)],
        baseline=names[0],
        protocol=Settings(
            rounds=recipe.rounds, slice_s=recipe.slice_s, transfers=recipe.with_transfers, seed=recipe.seed
        ),
        on_progress=update,
    )
    failures = {name: reason for name in names for key, reason in result["skipped"].items() if key.split()[0] == name}
    return {timing["candidate"]: timing for timing in result["timings"]}, failures


def sized_inputs(signature: Signature, sample: Mapping[str, np.ndarray]) -> list[SizedInputs]:
    """The sample at every size that is measured."""
    from .benchmark import batch_sizes

    return [sized(signature, sample, sizes) for sizes in batch_sizes(signature)]


def sized(signature: Signature, sample: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> SizedInputs:
    """The sample at one size."""
    from .benchmark import SizedInputs

    first = next((spec.shape[0] for spec in signature.inputs if spec.shape), 1)
    batch = sizes[signature.batch_axis] if signature.batch_axis else int(first)
    inputs = resized(signature, sample, sizes)
    return SizedInputs(sizes, batch, in_the_middle(signature, inputs) if signature.states else inputs)


def load_metric(recipe: Recipe) -> MetricFunction | None:
    """The user's metric, or the one that a name stands for.

    Raises:
        RecipeError: there is no such file, or what it names does not take outputs and inputs.
        UnknownNameError: the file does not define that name.
    """
    if recipe.metric is None:
        return None
    if recipe.metric == PERPLEXITY:
        from .generation.likelihood import log_likelihood

        return log_likelihood
    if ":" not in recipe.metric and not recipe.metric.endswith(".py"):
        raise UnknownNameError("metric", Path(recipe.metric).name, [PERPLEXITY.strip("<>"), "FILE.py:FUNCTION"])
    from .sources.user_code import check_call, load_symbol, running

    metric: MetricFunction = load_symbol(recipe.metric, kind="metric", error=RecipeError)
    check_call(metric, recipe.metric, kind="metric", arguments=("outputs", "inputs"), error=RecipeError)
    file = Path(recipe.metric.rpartition(":")[0]).absolute()

    @functools.wraps(metric)
    def guarded(outputs: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]) -> Any:
        with running(file, error=RecipeError):
            return metric(outputs, inputs)

    return guarded


def try_metric(recipe: Recipe, reference: ReferenceOutputs) -> None:
    """Calls the metric on the reference's own outputs of one sample, so that what it lacks shows before anything long.

    Raises:
        RecipeError: what the metric raises.
    """
    metric = load_metric(recipe)
    sample = next((found for found in reference if not found.probe), None) if metric else None
    if metric and sample:
        metric(sample.outputs, {**sample.inputs, **sample.labels})


def load_budget(recipe: Recipe) -> Budget | None:
    """The recipe's budget, with the user's metric. Raises as `load_metric`."""
    from .budget import Budget, Meter

    if recipe.budget is None:
        return None
    budget = dataclasses.replace(Budget.parse(recipe.budget), metric=load_metric(recipe))
    Meter(budget)  # one on a metric that is not given fails before any work
    return budget


def calibration_of(recipe: Recipe, signature: Signature, data: Data, cache: Cache) -> Calibration | None:
    """What ranges are seen in; None where the data are made up, and the user has not agreed to that."""
    from .calibration import Calibration, CalibrationSettings

    if recipe.calibration_data is not None:
        data = open_data(recipe.calibration_data, signature, seed=recipe.seed)
    if data.random and not recipe.random_calibration:
        return None
    settings = CalibrationSettings(
        max_samples=recipe.calibration_samples, allow_random=recipe.random_calibration, seed=recipe.seed
    )
    return Calibration(data, settings, cache if is_repeatable(recipe) else None)


def _tolerance(recipe: Recipe, precision: str, budget: Budget | None, *, lossy: bool) -> Mapping[str, float]:
    """The user's bounds; a budget that an engine may spend stands in for the default bound on the same measure.

    Args:
        lossy: whether the engine has an optional step that changes results: there the budget stands in for all.
    """
    bounds = recipe.tolerances.get(precision, {})
    if budget is None:
        return bounds
    own = {budget.kind: budget.bound} if budget.kind in resolve_tolerance(precision) else {}
    return {**(SPENT if lossy else {}), **own, **bounds}


def verdict(
    engines: Sequence[EngineRecord],
    benchmark: Benchmark | None,
    signature: Signature,
    notes: Sequence[str] = (),
    missed: str = "",
    objective: Objective = LATENCY,
) -> dict[str, Any]:
    """Good where every engine that runs here loads and is right; the best of them is best by the objective.

    Where engines were built but none of them runs on this machine the state is "unproven": nothing was compared. Notes
    say what does not change the verdict, and should be known. Engines that are dropped count for nothing. `missed` is
    a goal that the engines miss; empty where there is none.
    """
    judged = [engine for engine in engines if engine["validation"] and not engine["dropped"]]
    right = [engine["name"] for engine in judged if engine["validation"] and engine["validation"]["passed"]]
    wrong = [engine["name"] for engine in judged if engine["name"] not in right]
    broken = [engine["name"] for engine in engines if engine["status"] == "failed" and engine["build_s"] is not None]
    passed = not (wrong or broken or missed) and any(engine["status"] in ("ready", "built") for engine in engines)
    reasons = [f"{name} failed its validation" for name in wrong]
    reasons += [f"{engine['name']}: {engine['reason']}" for engine in engines if engine["status"] != "ready"]
    reasons += [missed] if missed else []
    found = ranks(engines, benchmark, signature, objective)
    best = min(right, key=lambda name: found[name], default=None)
    timing = decisive(benchmark, signature, objective).get(best or "")
    return {
        "passed": passed,
        "state": "failed" if not passed else "passed" if right else "unproven",
        "judged": len(judged),
        "best": best,
        "speed_up": timing["speed_up"] if timing else None,
        "reasons": reasons,
        "notes": [*notes, *gains.notes(engines, benchmark, signature)],
    }


def _baselines(
    folder: Path, recipe: Recipe, model: Model | None, engines: Sequence[EngineRecord]
) -> tuple[list[Candidate], dict[str, str]]:
    """Candidates in torch, and the reason where there can be none."""
    from .benchmark.baselines import torch_baselines

    names = {engine["name"] for engine in engines}
    asked = [name for name in recipe.baselines if name not in names]
    if unknown := [name for name in asked if name not in TORCH_BASELINES]:
        raise UnknownNameError("baseline", unknown[0], [*TORCH_BASELINES, *names])
    if not asked:
        return [], {}
    if model is None or model.module is None:
        return [], dict.fromkeys(asked, "there is no torch module: the model is ONNX, or was given in Python")
    device = "cuda" if _any_on_gpu(folder, engines) else "cpu"
    candidates = torch_baselines(model, device=device, compiled="torch.compile" in asked)
    return [candidate for candidate in candidates if candidate.name in asked], {}


def _any_on_gpu(folder: Path, engines: Sequence[EngineRecord]) -> bool:
    names = [engine["name"] for engine in engines if engine["status"] == "ready"]
    infos = [EngineInfo.read(folder / "engines" / name) for name in names]
    ready = [get_target(info.target, info.options) for info in infos]
    return any("cuda" in target.capabilities.devices and "cpu" not in target.capabilities.devices for target in ready)


def _baseline_name(recipe: Recipe, candidates: Sequence[Candidate]) -> str:
    names = [candidate.name for candidate in candidates]
    return next((name for name in recipe.baselines if name in names), names[0])
