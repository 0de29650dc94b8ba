"""Runs a graph over data, and collects the statistics of its tensors as the batches go by."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx_ir as ir

from ...errors import DataError, GraphError
from ..graph import Graph
from ..graph.probe import Session, Tapped, chunks, sizes
from .layout import channel_axes
from .observer import Observer
from .settings import CalibrationSettings
from .statistics import Detail, Statistics

Batch = Mapping[str, np.ndarray]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
_SAME = 1e-3


def float_activations(graph: Graph) -> list[str]:
    """Names of the float inputs and node outputs of the main graph, constants left out."""
    main = graph.model.graph
    inputs = [value for value in main.inputs if not value.is_initializer()]
    made = [value for node in main if node.op_type != "Constant" for value in node.outputs]
    return [value.name for value in (*inputs, *made) if value.name and value.dtype in _FLOATS]


def observe(
    graph: Graph, samples: Iterable[Batch], names: Collection[str] | None, settings: CalibrationSettings, detail: Detail
) -> Statistics:
    """Statistics of these tensors of the main graph (None: all float activations).

    Args:
        graph: with types inferred; stays as it is.
        samples: iterated once, and once more for each further group of tensors where they do not fit in memory.
        names: float tensors.
        settings: how.
        detail: what.

    Raises:
        DataError: there are no samples; an output of the graph holds NaN or positive infinity on them.
        GraphError: no such tensor; ONNX Runtime refuses the graph or the data.
        TargetUnavailableError: ONNX Runtime is not installed.
    """
    names = list(dict.fromkeys(float_activations(graph) if names is None else names))
    first = next(iter(samples), None)
    if first is None:
        raise DataError("there are no samples to collect statistics from", expected="at least one", found="none")
    held = sizes(graph, names, first, threads=settings.threads) if names else {}
    limit = settings.memory_mib << 20
    rows = None
    groups = [names]
    if sum(held.values()) > limit:
        rows = _rows_at_once(graph, first, sum(held.values()), limit, settings)
        groups = [names] if rows else chunks(held, limit)
    axes = channel_axes(graph)
    observers = {
        name: Observer(name, axes.get(name, -1), full=detail == "full", seed=settings.seed, momentum=settings.momentum)
        for name in names
    }
    seen = _Inputs(graph)
    threads = settings.threads or os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        for number, group in enumerate(groups):
            tapped = Tapped(graph, group, optimized=True, threads=settings.threads)
            for batch in limited(samples, settings.max_samples):
                if number == 0:
                    seen.add(batch)
                for part in _parts(batch, rows):
                    _take(graph, tapped(part), part, {name: observers[name] for name in group}, pool.map)
                for name in group:
                    observers[name].end_batch()
    results = {name: result for name, observer in observers.items() if (result := observer.result())}
    return Statistics(
        tensors={name: result for name, result in results.items() if not result.masked},
        left_out={name: result for name, result in results.items() if result.masked},
        empty=frozenset(names) - results.keys(),
        inputs=seen.ranges,
        samples=seen.samples,
        distinct=len(seen.digests),
        data_digest=seen.digest.hexdigest(),
        random=bool(getattr(samples, "random", False)),
        detail=detail,
    )


def limited(samples: Iterable[Batch], most: int | None) -> Iterator[Batch]:
    """Whole batches, up to the one that reaches this many samples."""
    count = 0
    for batch in samples:
        yield batch
        count += samples_in(batch)
        if most is not None and count >= most:
            return


def samples_in(batch: Batch) -> int:
    """Length of the leading axis of the first input that has one."""
    return next((len(array) for array in map(np.asarray, batch.values()) if array.ndim), 1)


def _take(
    graph: Graph,
    found: dict[str, np.ndarray],
    part: Batch,
    observers: Mapping[str, Observer],
    apply: Callable[..., Iterator[None]],
) -> None:
    for name in graph.output_names:
        array = found[name]
        if array.dtype.kind == "f" and not _sane(array):
            raise _broken(graph, name, part)
    count = samples_in(part)
    for _ in apply(lambda name: observers[name].add(found[name], count), observers):
        pass


def _sane(array: np.ndarray) -> bool:
    """Whether there is neither NaN nor positive infinity; minus infinity is what scores that are masked have."""
    return not array.size or bool(array.max() < np.inf)


def _broken(graph: Graph, output: str, inputs: Batch) -> DataError:
    """Looks for the first tensor that has NaN, or else infinity, while what it is made from has none."""
    names = float_activations(graph)
    bad: dict[str, str] = {}
    for group in chunks(sizes(graph, names, inputs), 256 << 20):
        found = Tapped(graph, group)(inputs)
        bad.update({name: "NaN" for name in group if np.isnan(found[name]).any()})
        bad.update({name: "infinity" for name in group if name not in bad and np.isinf(found[name]).any()})
    for kind in ("NaN", "infinity"):
        for node in graph.model.graph:
            made = [value.name for value in node.outputs if bad.get(value.name or "") == kind]
            if made and not any(value is not None and value.name in bad for value in node.inputs):
                return _error(output, f"{kind} first in tensor {made[0]!r}, made by {node.op_type} {node.name!r}")
    return _error(output, "NaN or infinity")


def _error(output: str, found: str) -> DataError:
    return DataError(
        f"output {output!r} is not finite on the calibration data",
        expected="finite numbers",
        found=found,
        hint="check that the data is prepared as the model expects it (scale, layout, padding)",
    )


def _parts(batch: Batch, rows: int | None) -> Iterator[Batch]:
    count = samples_in(batch)
    if rows is None or count <= rows:
        yield batch
        return
    for start in range(0, count, rows):
        yield {
            name: array[start : start + rows] if array.ndim and len(array) == count else array
            for name, array in batch.items()
        }


def _rows_at_once(graph: Graph, batch: Batch, held: int, limit: int, settings: CalibrationSettings) -> int | None:
    """How many rows of a batch may run together; None where a part of a batch is not what it is in the whole.

    That is found by running, for a first axis that is dynamic may be time as well as the batch.
    """
    leading = [v.shape[0] for v in graph.model.graph.inputs if v.shape is not None and len(v.shape)]
    count = samples_in(batch)
    rows = limit * count // held
    if rows < 1 or count < 2 or any(isinstance(size, int) for size in leading):
        return None
    session = Session(graph, optimized=True, threads=settings.threads)
    whole = session(batch)
    try:
        parts = [session(part) for part in itertools.islice(_parts(batch, rows), 2)]
    except GraphError:
        return None
    for expected, *found in zip(whole, *parts, strict=True):
        joined = np.concatenate(found) if expected.ndim else found[0]
        if expected.ndim and expected.shape[1:] != joined.shape[1:]:
            return None
        if not np.allclose(expected[: len(joined)] if expected.ndim else expected, joined, _SAME, _SAME, True):
            return None
    return rows


class _Inputs:
    """Counts the samples, tells them apart, and follows the range of the graph's inputs."""

    def __init__(self, graph: Graph) -> None:
        self._names = graph.input_names
        self.ranges: dict[str, tuple[float, float, int, bool]] = {}
        self.digests: set[bytes] = set()
        self.digest = hashlib.sha256()
        self.samples = 0

    def add(self, batch: Batch) -> None:
        count = samples_in(batch)
        self.samples += count
        for name in self._names:
            array = np.asarray(batch[name])
            if array.size and array.dtype.kind in "biuf":
                low, high, size, _ = self.ranges.get(name, (np.inf, -np.inf, 0, False))
                low, high = min(low, float(array.min())), max(high, float(array.max()))
                self.ranges[name] = low, high, max(size, array.size), array.dtype.kind == "f"
        for row in range(count):
            own = hashlib.sha256()
            for name in self._names:
                array = np.asarray(batch[name])
                own.update(np.ascontiguousarray(array[row] if array.ndim and len(array) == count else array).tobytes())
            self.digests.add(own.digest())
            self.digest.update(own.digest())
