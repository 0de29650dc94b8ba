"""`assert_engine_close`: an engine gives what its reference gives, or an AssertionError says what differs where."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..compiler.bundle import Bundle
from ..compiler.comparison.place import Place, find
from ..compiler.engine import Engine
from ..compiler.manifest import OutputMetrics, Tolerance
from ..compiler.signature import TensorSpec
from ..compiler.states import class_scores
from ..compiler.validation.metrics import Difference, Judge, coarser, failures, resolve_tolerance
from ..errors import DataError
from .expected import pairs

Inputs = Mapping[str, Any] | Sequence[Mapping[str, Any]] | str | Path
Bounds = str | Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Closeness:
    """How far one output is from the reference over all samples, and where it is farthest off.

    Attributes:
        metrics: the worst of every number; None for numbers that do not exist or are not finite.
        sample: number of the worst sample, from 0; None where the output is equal everywhere.
        index: place in that sample's array; None where shapes or dtypes differ.
        expected: the reference's value there; `found` is the engine's.
    """

    metrics: OutputMetrics
    sample: int | None = None
    index: tuple[int, ...] | None = None
    expected: float | None = None
    found: float | None = None

    @property
    def passed(self) -> bool:
        """Whether every bound holds."""
        return self.metrics["passed"]


def assert_engine_close(
    engine: str | Path | Bundle | Engine,
    reference: Any = None,
    *,
    inputs: Inputs | None = None,
    tolerance: Bounds | None = None,
    max_samples: int = 32,
    seed: int = 0,
) -> dict[str, Closeness]:
    """Asserts that an engine gives what its reference gives, output by output, on every sample.

    Args:
        engine: a bundle (its best engine here), ``BUNDLE#ENGINE``, the folder of an engine, or a loaded engine.
        reference: a torch module; a model file or ``file.py:factory``; a function that takes arrays by the names of
            the inputs, such as another engine; saved outputs: an array, a dict by the names of the outputs, a list of
            dicts, one a sample, an .npz file of them, or the folder of a bundle's record. None is the bundle's own
            record.
        inputs: a dict of arrays by name, a list of dicts, or what `--data` takes. Default: those of the record.
        tolerance: the name of a precision whose bounds hold, or bounds in place of the engine's own: ``relative_l2``,
            ``max_abs``, ``cosine``, ``top1``. Default: those that it was compiled with, or of its precision.
        max_samples: how many samples are taken at most.
        seed: of random data, where `inputs` asks for such.

    Returns:
        By the name of the output, how close it is.

    Raises:
        AssertionError: a bound does not hold; the message is a table.
        UsageError: there is no such engine, or inputs and reference do not fit it.
        EngineError: the engine cannot run.
    """
    __tracebackhide__ = True  # pytest shows the caller's line
    with _opened(engine) as (loaded, place):
        bounds = _bounds(loaded, place, tolerance)
        signature = loaded.signature
        judge = Judge(bounds, {spec.name: _host_dtype(spec) for spec in signature.outputs}, class_scores(signature))
        worst: dict[str, _Worst] = {}
        count = 0
        for count, (given, expected) in enumerate(pairs(loaded, place, reference, inputs, max_samples, seed), start=1):
            loaded.reset()
            found = {name: _host(array) for name, array in loaded.run(given).items()}
            for name, difference in judge.update(expected, found).items():
                place_of = worst.setdefault(name, _Worst(bounds))
                place_of.update(count - 1, difference, expected.get(name), found.get(name))
    if not count:
        raise DataError("there are no samples to compare on", expected="at least one", found="none")
    result = {m["output"]: worst[m["output"]].closeness(m) for m in judge.metrics()}
    if not all(output.passed for output in result.values()):
        raise AssertionError(_table(loaded.name, result, bounds, count))
    return result


@contextlib.contextmanager
def _opened(engine: str | Path | Bundle | Engine) -> Iterator[tuple[Engine, Place | None]]:
    """An engine that was given open stays open."""
    if isinstance(engine, Engine):
        yield engine, None
        return
    place = find(engine.path if isinstance(engine, Bundle) else engine)
    with place.engine() as loaded:
        yield loaded, place


def _bounds(engine: Engine, place: Place | None, tolerance: Bounds | None) -> Tolerance:
    if isinstance(tolerance, str):
        return resolve_tolerance(tolerance)
    own = place or Place(Path(), engine.info)
    if tolerance is None:
        return own.tolerance
    precision = coarser(own.judged_as, (spec.dtype for spec in engine.signature.outputs))
    changed = {key: value for key, value in resolve_tolerance(precision, tolerance).items() if key in tolerance}
    return cast(Tolerance, {**own.tolerance, **changed})


class _Worst:
    """The place where an output is farthest off."""

    def __init__(self, bounds: Tolerance) -> None:
        self._bounds = bounds
        self._rank = (-1, -1.0)
        self._where: tuple[int, tuple[int, ...] | None, float | None, float | None] | None = None

    def update(self, sample: int, difference: Difference, expected: Any, found: Any) -> None:
        """Takes in one sample: one with a bound that does not hold is worse than any without."""
        error = difference.relative_l2
        size = math.inf if difference.nan or difference.inf or (error is not None and math.isnan(error)) else error or 0
        rank = (len(failures(difference, self._bounds)), size)
        equal = not (rank[0] or size)
        if rank > self._rank and not equal:
            self._rank, self._where = rank, (sample, *_farthest(expected, found))

    def closeness(self, metrics: OutputMetrics) -> Closeness:
        """With the numbers over all samples."""
        return Closeness(metrics, *self._where) if self._where else Closeness(metrics)


def _farthest(expected: Any, found: Any) -> tuple[tuple[int, ...] | None, float | None, float | None]:
    """Index of the value that is farthest off, and both values there; a NaN is farther than any number."""
    if expected is None or found is None or expected.shape != found.shape or not expected.size:
        return None, None, None
    if expected.dtype.kind == "c" or found.dtype.kind == "c":
        return None, None, None
    r, y = expected.astype(np.float64), found.astype(np.float64)
    with np.errstate(all="ignore"):
        distance = np.where(r == y, 0.0, np.abs(y - r))
    distance[np.isnan(distance)] = np.inf
    distance[np.isnan(r) & np.isnan(y)] = 0.0
    index = tuple(int(axis) for axis in np.unravel_index(int(distance.argmax()), distance.shape))
    return index, float(r[index]), float(y[index])


def _table(engine: str, outputs: Mapping[str, Closeness], bounds: Tolerance, count: int) -> str:
    wrong = sum(not output.passed for output in outputs.values())
    limits = ", ".join(f"{key} {value:g}" for key, value in cast(Mapping[str, float], bounds).items())
    headers = ("output", "verdict", "rel. L2", "max abs", "cosine", "NaN", "Inf", "worst place")
    rows = [headers, *(_cells(name, output) for name, output in outputs.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(headers))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    reasons = [f"{name}: {reason}" for name, output in outputs.items() for reason in output.metrics["failures"]]
    return "\n".join(
        [
            f"engine {engine} is not close to its reference: {wrong} of {len(outputs)} outputs differ, {count} "
            f"sample{'' if count == 1 else 's'}",
            f"allowed: {limits}",
            "",
            *lines,
            "",
            *reasons,
        ]
    )


def _cells(name: str, output: Closeness) -> tuple[str, ...]:
    metrics = output.metrics
    place = "-"
    if output.sample is not None and not output.passed:
        place = f"sample {output.sample}"
        if output.index is not None:
            place += f", {list(output.index)}: expected {output.expected:.6g}, found {output.found:.6g}"
    return (
        name,
        "ok" if metrics["passed"] else "DIFFERS",
        _number(metrics["relative_l2"], ".2g"),
        _number(metrics["max_abs"], ".2g"),
        _number(metrics["cosine"], ".6f"),
        str(metrics["nan"]),
        str(metrics["inf"]),
        place,
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _host_dtype(spec: TensorSpec) -> str:
    """NumPy has no bfloat16: such outputs are compared in float32."""
    return "float32" if spec.dtype == "bfloat16" else spec.dtype


def _host(array: Any) -> np.ndarray:
    made: np.ndarray = np.asarray(array)
    return made.astype(np.float32) if str(made.dtype) == "bfloat16" else made
