"""Judges engines against the reference, and says how far the captured graph itself is from it (the noise floor).

Engines run as Polygraphy runners, and what they gave is saved in Polygraphy's formats; see polygraphy_io.py.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import DataError, EngineError, EnginesmithError, RecipeError
from ..budget import Budget, Meter
from ..generation.likelihood import log_likelihood
from ..manifest import BudgetRecord, OutputMetrics, TaskMetric, Validation
from ..signature import Signature
from ..states import class_scores
from .metrics import Judge, coarser, resolve_tolerance
from .polygraphy_io import EngineRunner, Trail, host_dtype
from .reference import Recorded, ReferenceOutputs

if TYPE_CHECKING:
    from ...targets.base import Runner
    from ..sources import Model

Arrays = Mapping[str, np.ndarray]
MetricFunction = Callable[[Arrays, Arrays], Any]
"""Takes outputs and inputs (labels among them) of one sample, and gives one number, or one a row."""

FLOOR_SAMPLES = 8
RESAMPLES = 1000
LARGEST_LOG = 709.0
"""Below the logarithm of the largest float64: a perplexity beyond that is no number."""


def validate(
    engine: str,
    runner: Runner,
    reference: ReferenceOutputs,
    *,
    precision: str,
    signature: Signature | None = None,
    tolerance: Mapping[str, float] | None = None,
    floor: tuple[str, list[OutputMetrics]] = ("", []),
    metric: MetricFunction | None = None,
    budget: Budget | None = None,
    directory: Path | None = None,
    seed: int = 0,
) -> Validation:
    """Runs an engine over the record and judges it; an engine that fails to run fails the validation.

    Args:
        signature: the engine's own, where it takes or gives other dtypes than the model.
        tolerance: bounds in place of those of `precision`, or of the reference's outputs where theirs is coarser.
        floor: what `noise_floor` found.
        budget: must hold beside the tolerance.
        directory: existing folder for results.json and accuracy.json.

    Raises:
        UnknownNameError: a precision or a bound that does not exist.
        RecipeError: a bound that is no number, a metric that gives no number on the reference.
    """
    signature = signature or reference.signature
    bounds = resolve_tolerance(coarser(precision, (s.dtype for s in reference.signature.outputs)), tolerance)
    judge = Judge(bounds, {spec.name: host_dtype(spec) for spec in signature.outputs}, class_scores(signature))
    trail = Trail(engine, bounds)
    scores = _Scores(metric)
    meter = Meter(budget) if budget else None
    samples = 0
    with EngineRunner(runner, signature, engine) as polygraphy_runner:
        for sample in reference:
            try:
                outputs = polygraphy_runner.infer(sample.inputs, check_inputs=False)
            except EnginesmithError as error:
                judge.fail(sample.outputs, f"the engine failed on {_where(sample)}: {error}")
                break
            differences = judge.update(sample.outputs, outputs)
            trail.add(sample, outputs, differences, polygraphy_runner.last_inference_time())
            samples += not sample.probe
            if not sample.probe and _alike(sample.outputs, outputs):
                scores.add(sample, outputs)
                if meter:
                    meter.add(sample.outputs, outputs, {**sample.inputs, **sample.labels})
    if not samples and not judge.metrics():
        raise DataError("the record of the reference holds no samples", hint="compile the model again")
    if directory is not None:
        trail.save(directory)
    found, spent = judge.metrics(), _spent(meter, samples)
    return Validation(
        engine=engine,
        passed=all(output["passed"] for output in found) and (spent is None or spent["holds"]),
        samples=samples,
        tolerance=bounds,
        outputs=found,
        noise_floor=floor[1],
        noise_floor_of=floor[0],
        metric=scores.result(seed),
        budget=spent,
    )


def _spent(meter: Meter | None, samples: int) -> BudgetRecord | None:
    """What of the budget is used; one that nothing could be measured for does not hold."""
    if meter is None:
        return None
    value = meter.value if samples else math.nan
    holds = samples > 0 and meter.budget.holds(value)
    problem = meter.broken or ("" if samples else "the engine gave no outputs that can be compared")
    return BudgetRecord(
        text=str(meter.budget), value=value if math.isfinite(value) else None, holds=holds, problem=problem
    )


def noise_floor(
    reference: ReferenceOutputs, model: Model, graph: Path | None, *, max_samples: int = FLOOR_SAMPLES
) -> tuple[str, list[OutputMetrics]]:
    """What differs although nothing was optimized: the captured fp32 graph as ONNX Runtime runs it on the CPU.

    Where there is no graph, or none that ONNX Runtime takes, it is the reference run a second time.
    """
    if graph is not None:
        with contextlib.suppress(EngineError):
            metrics = _floor(reference, _plain_session(graph), max_samples)
            return "captured graph in fp32, ONNX Runtime on the CPU without optimizations", metrics

    def again(inputs: Arrays) -> dict[str, np.ndarray]:
        model.reference.reset()
        return model.reference.run(inputs)

    return "reference, run a second time", _floor(reference, again, max_samples)


def _floor(
    reference: ReferenceOutputs, run: Callable[[Arrays], dict[str, np.ndarray]], max_samples: int
) -> list[OutputMetrics]:
    judge = Judge(resolve_tolerance("fp32"))
    for sample in itertools.islice((sample for sample in reference if not sample.probe), max_samples):
        judge.update(sample.outputs, run(sample.inputs))
    return judge.metrics()


def _plain_session(graph: Path) -> Callable[[Arrays], dict[str, np.ndarray]]:
    from ...targets._onnxruntime import HostRunner, Session, require_onnxruntime

    require_onnxruntime("cpu")
    session = Session(optimization="none").open(graph)
    return HostRunner(session, [output.name for output in session.get_outputs()]).run


class _Scores:
    """The user's metric on the engine and on the reference, one number a row or a sample."""

    def __init__(self, metric: MetricFunction | None) -> None:
        self._metric = metric
        self._engine: list[np.ndarray] = []
        self._reference: list[np.ndarray] = []

    def add(self, sample: Recorded, outputs: Arrays) -> None:
        if self._metric is None:
            return
        given = {**sample.inputs, **sample.labels}
        self._engine.append(self._numbers(outputs, given))
        self._reference.append(self._numbers(sample.outputs, given))
        if not np.isfinite(self._reference[-1]).all():
            raise RecipeError(f"metric {_name(self._metric)!r} is not finite on the reference's own outputs")

    def result(self, seed: int) -> TaskMetric | None:
        """Mean and its 95 % interval by bootstrap over rows; None where the engine's values are not finite."""
        if self._metric is None or not self._engine:
            return None
        values = np.concatenate(self._engine)
        if not np.isfinite(values).all():
            return None
        generator = np.random.default_rng(seed)
        means = [values[generator.integers(0, values.size, values.size)].mean() for _ in range(RESAMPLES)]
        low, high = np.quantile(means, [0.025, 0.975])
        found = TaskMetric(
            name=_name(self._metric),
            value=float(values.mean()),
            low=float(low),
            high=float(high),
            reference=float(np.concatenate(self._reference).mean()),
            samples=int(values.size),
        )
        if self._metric is log_likelihood and max(-found["value"], -found["reference"]) < LARGEST_LOG:
            found["perplexity"] = math.exp(-found["value"])
            found["perplexity_of_reference"] = math.exp(-found["reference"])
        return found

    def _numbers(self, outputs: Arrays, inputs: Arrays) -> np.ndarray:
        assert self._metric is not None
        result = np.asarray(self._metric(outputs, inputs))
        if result.dtype.kind not in "biuf" or result.ndim > 1 or not result.size:
            raise RecipeError(
                f"metric {_name(self._metric)!r} gives something else than numbers",
                expected="one number, or one a row",
                found=f"{result.dtype} of shape {result.shape}",
            )
        return np.atleast_1d(result).astype(np.float64)


def _alike(reference: Arrays, outputs: Arrays) -> bool:
    """Whether a metric that is written for the reference's outputs can read these."""
    return all(name in outputs and outputs[name].shape == array.shape for name, array in reference.items())


def _where(sample: Recorded) -> str:
    shapes = ", ".join(f"{name} {array.shape}" for name, array in sample.inputs.items())
    return f"sample {sample.key} ({shapes})"


def _name(metric: MetricFunction) -> str:
    return getattr(metric, "__name__", type(metric).__name__)
