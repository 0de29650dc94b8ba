"""Puts engines on trial: judged against the record of the reference, measured against the baselines, and a verdict."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EnginesmithError, TargetUnavailableError, UnknownNameError
from ..targets import get_target
from ..targets.base import EngineInfo, Runner
from .bundle import Bundle
from .data import open_data, resized
from .engine import check_files
from .manifest import Benchmark, EngineRecord, OutputMetrics, Validation
from .progress import Progress
from .recipe import Recipe, make_recipe, read_recipe
from .signature import Signature, parse_inputs
from .storage.memory import release
from .validation.reference import ReferenceOutputs

if TYPE_CHECKING:
    import torch

    from .benchmark import Candidate, SizedInputs
    from .sources import Model
    from .validation.validator import MetricFunction


TORCH_BASELINES = ("torch", "torch.compile")


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
        arguments=recipe.arguments,
        device=recipe.reference_device,
        sample=open_data(recipe.data, inputs, seed=recipe.seed).first() if inputs and recipe.data else None,
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
    ready = [engine for engine in engines if engine["status"] == "ready"]
    for number, engine in enumerate(ready):
        update(number / len(ready), engine["name"])
        directory = folder / "engines" / engine["name"]
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
                precision=engine["precision"],
                signature=EngineInfo.read(directory).signature,
                tolerance=recipe.tolerances.get(engine["precision"]),
                floor=floor,
                metric=metric,
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
    candidates, skipped = _baselines(recipe, model, engines)
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
        on_progress=update,
    )
    result["skipped"].update(skipped)
    return result


def sized_inputs(signature: Signature, sample: Mapping[str, np.ndarray]) -> list[SizedInputs]:
    """The sample at every size that is measured."""
    from .benchmark import SizedInputs, batch_sizes

    first = next((spec.shape[0] for spec in signature.inputs if spec.shape), 1)
    result = []
    for sizes in batch_sizes(signature):
        batch = sizes[signature.batch_axis] if signature.batch_axis else int(first)
        result.append(SizedInputs(sizes, batch, resized(signature, sample, sizes)))
    return result


def load_metric(recipe: Recipe) -> MetricFunction | None:
    """The user's metric."""
    if recipe.metric is None:
        return None
    from .sources.user_code import load_symbol, running

    metric: MetricFunction = load_symbol(recipe.metric, kind="metric")
    file = Path(recipe.metric.rpartition(":")[0]).absolute()

    @functools.wraps(metric)
    def guarded(outputs: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]) -> Any:
        with running(file):
            return metric(outputs, inputs)

    return guarded


def verdict(engines: Sequence[EngineRecord], benchmark: Benchmark | None, signature: Signature) -> dict[str, Any]:
    """Good where every engine that was judged is right; the best is the fastest of them at the optimum sizes."""
    judged = [engine for engine in engines if engine["validation"]]
    right = [engine["name"] for engine in judged if engine["validation"] and engine["validation"]["passed"]]
    reasons = [f"{engine['name']} failed its validation" for engine in judged if engine["name"] not in right]
    reasons += [f"{engine['name']}: {engine['reason']}" for engine in engines if engine["status"] != "ready"]
    timings = [
        timing
        for timing in (benchmark["timings"] if benchmark else [])
        if timing["candidate"] in right and timing["sizes"] == signature.sizes()
    ]
    fastest = min(timings, key=lambda timing: timing["p50_ms"], default=None)
    return {
        "passed": len(right) == len(judged) and any(engine["status"] in ("ready", "built") for engine in engines),
        "judged": len(judged),
        "best": fastest["candidate"] if fastest else next(iter(right), None),
        "speed_up": fastest["speed_up"] if fastest else None,
        "reasons": reasons,
    }


def _baselines(
    recipe: Recipe, model: Model | None, engines: Sequence[EngineRecord]
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
        return [], dict.fromkeys(asked, "the model is no torch module")
    device = "cuda" if _any_on_gpu(engines) else "cpu"
    candidates = torch_baselines(model, device=device, compiled="torch.compile" in asked)
    return [candidate for candidate in candidates if candidate.name in asked], {}


def _any_on_gpu(engines: Sequence[EngineRecord]) -> bool:
    ready = [get_target(engine["target"]) for engine in engines if engine["status"] == "ready"]
    return any("cuda" in target.capabilities.devices and "cpu" not in target.capabilities.devices for target in ready)


def _baseline_name(recipe: Recipe, candidates: Sequence[Candidate]) -> str:
    names = [candidate.name for candidate in candidates]
    return next((name for name in recipe.baselines if name in names), names[0])


def validate_bundle(
    path: Path, engines: Sequence[str] = (), *, progress: Progress | None = None, **fields: Any
) -> list[Validation]:
    """Judges the engines of a bundle again: on its own record of the reference, or on new data with the model.

    Args:
        engines: names of the engines to judge; all that run here where empty.
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
            reference = ReferenceOutputs(path / "reference", signature)
        validate_engines(path, chosen, reference, floor, recipe, (progress or Progress()).update, save=False)
    return [_judged(engine) for engine in chosen]


def benchmark_bundle(
    path: Path, engines: Sequence[str] = (), *, progress: Progress | None = None, **fields: Any
) -> Benchmark:
    """Measures the engines of a bundle again.

    Args:
        engines: names of the engines to measure; all that run here where empty.
        fields: `baselines`, `data`, `rounds`, `slice_s`, `with_transfers`, `seed` of the recipe.

    Raises:
        TargetUnavailableError: no engine that was asked for runs here.
    """
    bundle, recipe = _reopen(path, fields)
    chosen = _choose(bundle, engines)
    signature = Signature.from_json(bundle.manifest["signature"])
    if "data" in fields:
        sample: Mapping[str, np.ndarray] = open_data(recipe.data, signature, seed=recipe.seed).first()
    else:
        sample = next(iter(ReferenceOutputs(path / "reference", signature))).inputs
    in_torch = any(name in TORCH_BASELINES for name in recipe.baselines)
    model = load(recipe) if in_torch and bundle.manifest["source"]["kind"] != "onnx" else None
    update = (progress or Progress()).update
    result = benchmark_engines(path, chosen, sample, signature, recipe, model, update)
    assert result is not None, "_choose gives at least one engine that runs"
    return result


def _reopen(path: Path, fields: Mapping[str, Any]) -> tuple[Bundle, Recipe]:
    bundle = Bundle.open(path)
    recipe = read_recipe(path / "recipe.yaml")
    return bundle, make_recipe({**recipe.model_dump(), **fields}, "call")


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
        check_files(bundle.path, record["name"], bundle.manifest)
        state = get_target(record["target"]).availability()
        if state.run:
            chosen.append(EngineRecord(**{**record, "status": "ready", "validation": None}))
        else:
            reasons.append(f"{record['name']}: {state.reason}")
    if not chosen or (names and reasons):
        raise TargetUnavailableError(
            f"no engine of {str(bundle.path)!r} that was asked for runs here"
            if names
            else f"no engine of {str(bundle.path)!r} runs here",
            found="; ".join(reasons) or "none was built",
        )
    return chosen


def _judged(engine: EngineRecord) -> Validation:
    """The validation of an engine; one that does not load any more is an error, not a verdict."""
    if engine["validation"] is None:
        raise TargetUnavailableError(f"engine {engine['name']!r} cannot be judged", found=engine["reason"])
    return engine["validation"]
