"""What both engines give: beside each other on the same inputs, and each beside the record of its own reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from ...errors import EngineError, EnginesmithError
from ..again import validate_bundle
from ..manifest import Tolerance, Validation
from ..recipe import PERPLEXITY, Recipe, read_recipe
from ..states import class_scores
from ..trial import load_metric
from ..validation.metrics import Judge, resolve_tolerance
from ..validation.polygraphy_io import EngineRunner, host_dtype
from ..validation.validator import MetricFunction, validate
from .inputs import Given
from .pair import Pair
from .place import Place
from .records import MetricChange, Results

Arrays = Mapping[str, np.ndarray]
RESAMPLES = 2000


def look(both: Pair, recipe: Recipe, given: Mapping[str, Any]) -> tuple[Results, list[str]]:
    """Runs both on every sample, judges each on its record, and says what could not be judged.

    Args:
        recipe: the fields of the comparison; `given` holds those of them that were given.

    Raises:
        EngineError: A fails to run, so that there is nothing to compare with.
    """
    a, b = both.a, both.b
    notes: list[str] = []
    own = {label: _own(label, place, given, notes) for label, place in (("A", a), ("B", b))}
    for label, place, other in (("A", a, b), ("B", b, a)):
        if own[label] is None and other.bundle:
            own[label] = _on_record_of(other, place, recipe)
            notes.append(f"{label} has no record of a reference: it was judged on that of {other.bundle.path}")
    bounds = looser(_bounds(a, own["A"], recipe), _bounds(b, own["B"], recipe))
    judge = Judge(bounds, {spec.name: host_dtype(spec) for spec in b.signature.outputs}, class_scores(b.signature))
    scores = _Scores(_metric(a, b, recipe, given, notes), recipe.seed)
    count = _run_both(both, judge, scores)
    return Results(
        inputs=both.samples.where,
        samples=count,
        between=judge.metrics(),
        tolerance=bounds,
        a=own["A"],
        b=own["B"],
        own_record={"a": a.bundle is not None, "b": b.bundle is not None},
        metric=scores.change(),
    ), notes


def looser(one: Tolerance, other: Tolerance) -> Tolerance:
    """Of each bound the looser one."""
    return Tolerance(
        relative_l2=max(one["relative_l2"], other["relative_l2"]),
        max_abs=max(one["max_abs"], other["max_abs"]),
        cosine=min(one["cosine"], other["cosine"]),
        top1=min(one["top1"], other["top1"]),
    )


def _run_both(both: Pair, judge: Judge, scores: _Scores) -> int:
    """Runs A and then B on each sample, from their first state; returns the number of samples."""
    a, b = both.a, both.b
    opened_a, opened_b = a.open(), b.open()
    count = 0
    try:
        with EngineRunner(opened_a, a.signature, "A") as run_a, EngineRunner(opened_b, b.signature, "B") as run_b:
            for sample in both.samples:
                try:
                    expected = run_a.infer(sample.inputs, check_inputs=False)
                except EnginesmithError as error:
                    raise EngineError(f"A ({a}) does not run, so that nothing can be compared: {error}") from error
                count += 1
                try:
                    found = run_b.infer(sample.inputs, check_inputs=False)
                except EnginesmithError as error:
                    shapes = ", ".join(f"{name} {array.shape}" for name, array in sample.inputs.items())
                    judge.fail(expected, f"B failed on {shapes}: {error}")
                    return count
                judge.update(expected, found)
                scores.add(sample, expected, found)
    finally:
        opened_a.close()
        opened_b.close()
    return count


def _own(label: str, place: Place, given: Mapping[str, Any], notes: list[str]) -> Validation | None:
    """The verdict on an engine by its bundle's own record; None where it has no bundle."""
    if place.bundle is None:
        return None
    fields = {name: given[name] for name in ("metric", "tolerances", "max_samples") if name in given}
    recipe = read_recipe(place.bundle.path / "recipe.yaml")
    if "metric" not in fields and recipe.metric and not _is_here(recipe.metric):
        fields["metric"] = None
        notes.append(f"{label} was compiled with the metric {recipe.metric!r}, which is not here")
        if recipe.budget and recipe.budget.startswith("metric="):
            fields["budget"] = None
            notes.append(f"the budget {recipe.budget} of {label} could not be judged without it")
    return validate_bundle(place.bundle.path, [place.info.name], **fields)[0]


def _on_record_of(other: Place, place: Place, recipe: Recipe) -> Validation:
    reference = other.reference(recipe.max_samples)
    assert reference is not None
    runner = place.open()
    try:
        return validate(
            place.info.name,
            runner,
            reference,
            precision=place.judged_as,
            signature=place.signature,
            tolerance=recipe.tolerances.get(place.info.precision),
            seed=recipe.seed,
        )
    finally:
        runner.close()


def _bounds(place: Place, own: Validation | None, recipe: Recipe) -> Tolerance:
    """What an engine may be off by: as it was judged just now, else by its precision."""
    if own is not None:
        return own["tolerance"]
    overrides = recipe.tolerances.get(place.info.precision)
    return resolve_tolerance(place.judged_as, overrides) if overrides else place.tolerance


def _metric(
    a: Place, b: Place, recipe: Recipe, given: Mapping[str, Any], notes: list[str]
) -> tuple[str, MetricFunction] | None:
    """The metric that was given, or that of B's recipe, or A's, where its file is here."""
    if "metric" in given:
        metric = load_metric(recipe)
        return (_name(metric), metric) if metric else None
    for place in (b, a):
        if place.bundle is None:
            continue
        own = read_recipe(place.bundle.path / "recipe.yaml")
        if own.metric and _is_here(own.metric):
            metric = load_metric(own)
            return (_name(metric), metric) if metric else None
    return None


class _Scores:
    """The task metric of both, row by row, on samples of the data."""

    def __init__(self, metric: tuple[str, MetricFunction] | None, seed: int) -> None:
        self._metric = metric
        self._seed = seed
        self._rows: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])

    def add(self, sample: Given, a: Arrays, b: Arrays) -> None:
        """Takes in a sample; made-up ones, and outputs that a metric written for A's cannot read, are left out."""
        alike = all(name in b and b[name].shape == array.shape for name, array in a.items())
        if self._metric is None or sample.probe or not alike:
            return
        for rows, outputs in zip(self._rows, (a, b), strict=True):
            values = self._metric[1](outputs, {**sample.inputs, **sample.labels})
            rows.append(np.atleast_1d(np.asarray(values, np.float64)))

    def change(self) -> MetricChange | None:
        """Means, and the interval of the mean difference over bootstrap resamples of rows; None without rows."""
        if self._metric is None or not self._rows[0]:
            return None
        a, b = (np.concatenate(rows) for rows in self._rows)
        if not np.isfinite(a).all():
            return None
        if not np.isfinite(b).all():
            return MetricChange(
                name=self._metric[0], a=float(a.mean()), b=None, change=None, low=None, high=None, rows=a.size
            )
        generator = np.random.default_rng(self._seed)
        difference = b - a
        picks = (generator.integers(0, difference.size, difference.size) for _ in range(RESAMPLES))
        low, high = np.quantile([difference[pick].mean() for pick in picks], [0.025, 0.975]).tolist()
        return MetricChange(
            name=self._metric[0],
            a=float(a.mean()),
            b=float(b.mean()),
            change=float(difference.mean()),
            low=low,
            high=high,
            rows=difference.size,
        )


def _is_here(metric: str) -> bool:
    return metric == PERPLEXITY or Path(metric.rpartition(":")[0] or metric).is_file()


def _name(metric: MetricFunction | None) -> str:
    return cast(str, getattr(metric, "__name__", "metric"))
