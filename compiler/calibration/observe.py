"""Runs a graph over data, and collects the statistics of its tensors as the batches go by."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator

import numpy as np
import onnx_ir as ir

from ...errors import DataError
from ..graph import Graph
from ..graph.probe import Tapped, chunks, sizes
from .layout import channel_axes
from .observer import Observer
from .reductions import SAMPLED
from .runner import Batch, Runner, samples_in
from .settings import CalibrationSettings
from .statistics import Detail, Statistics

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
_CHUNK_BYTES = 256 << 20

DEFAULTS = CalibrationSettings()


def float_activations(graph: Graph) -> list[str]:
    """Names of the float inputs and node outputs of the main graph, constants left out."""
    main = graph.model.graph
    inputs = [value for value in main.inputs if not value.is_initializer()]
    made = [value for node in main if node.op_type != "Constant" for value in node.outputs]
    return [value.name for value in (*inputs, *made) if value.name and value.dtype in _FLOATS]


def observe(
    graph: Graph,
    samples: Iterable[Batch],
    names: Collection[str] | None = None,
    settings: CalibrationSettings = DEFAULTS,
    detail: Detail = "range",
) -> Statistics:
    """Statistics of these tensors of the main graph (None: all float activations), from one pass over the samples.

    Memory beyond that of running two batches at a time is what the statistics themselves hold, up to 64 KiB a tensor,
    and where there are many images a second copy of the weights.

    Args:
        graph: with types and shapes inferred; stays as it is.
        samples: iterated once.
        names: float tensors.
        settings: how.
        detail: what.

    Raises:
        DataError: there are no samples; an output of the graph holds NaN or positive infinity on them.
        GraphError: no such tensor; ONNX Runtime refuses the graph or the data.
        TargetUnavailableError: ONNX Runtime is not installed.
    """
    names = list(dict.fromkeys(float_activations(graph) if names is None else names))
    axes = channel_axes(graph) if detail == "full" else {}
    observers = {name: Observer(axes.get(name), settings.momentum) for name in names}
    outputs = [value.name for value in graph.model.graph.outputs if value.name and value.dtype in _FLOATS]
    sampled = names if detail == "full" else ()
    runner = Runner(graph, dict.fromkeys((*names, *outputs)), axes, sampled, settings.threads)
    random = np.random.default_rng(settings.seed)
    seen = _Inputs(graph)
    batches = Limited(samples, settings.max_samples)
    for batch, readings in runner((batch, random.random(SAMPLED * samples_in(batch), np.float32)) for batch in batches):
        seen.add(batch)
        for name in outputs:
            if readings[name].broken:
                raise _broken(graph, name, batch)
        for name, observer in observers.items():
            observer.add(readings[name])
        del readings  # arrays of ONNX Runtime, which keep the memory of a session that is dropped
    if not seen.samples:
        raise DataError("there are no samples to collect statistics from", expected="at least one", found="none")
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


class Limited:
    """Whole batches of samples, up to the one that reaches a number of samples; empty ones left out."""

    def __init__(self, samples: Iterable[Batch], most: int | None) -> None:
        self._samples = samples
        self._most = most

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Reads the samples anew."""
        count = 0
        for batch in self._samples:
            if not all(array.size for array in batch.values()):
                continue
            yield dict(batch)
            count += samples_in(batch)
            if self._most is not None and count >= self._most:
                return


def _broken(graph: Graph, output: str, inputs: Batch) -> DataError:
    """Looks for the first tensor that has NaN, or else infinity, while what it is made from has none."""
    names = float_activations(graph)
    bad: dict[str, str] = {}
    for group in chunks(sizes(graph, names, inputs), _CHUNK_BYTES):
        found = Tapped(graph, group)(inputs)
        bad.update({name: "infinity" for name in group if np.isinf(found[name]).any()})
        bad.update({name: "NaN" for name in group if np.isnan(found[name]).any()})
    for kind in ("NaN", "infinity"):
        for node in graph.model.graph:
            made = [value.name for value in node.outputs if bad.get(value.name or "") == kind]
            if made and not any(value is not None and bad.get(value.name or "") == kind for value in node.inputs):
                return _error(output, f"{kind} first in tensor {made[0]!r}, made by {node.op_type} {node.name!r}")
    return _error(output, "NaN or infinity")


def _error(output: str, found: str) -> DataError:
    return DataError(
        f"output {output!r} is not finite on the calibration data",
        expected="finite numbers",
        found=found,
        hint="check that the data is prepared as the model expects it (scale, layout, padding)",
    )


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
            array = batch[name]
            if array.dtype.kind in "biuf":
                low, high, size, _ = self.ranges.get(name, (np.inf, -np.inf, 0, False))
                low, high = min(low, float(array.min())), max(high, float(array.max()))
                self.ranges[name] = low, high, max(size, array.size), array.dtype.kind == "f"
        for row in range(count):
            own = hashlib.sha256()
            for name in self._names:
                array = batch[name]
                own.update(np.ascontiguousarray(array[row] if array.ndim and len(array) == count else array).tobytes())
            self.digests.add(own.digest())
            self.digest.update(own.digest())
