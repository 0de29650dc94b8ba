"""What products take on a target at other sizes: a table of times, measured layer by layer.

Fewer multiply-adds are not less time: kernels take channels in blocks, and small products are bound by memory. So each
Conv, Gemm and MatMul is measured alone at a few lengths of what it reads and of what it gives, and the table is read
between its points; equal layers are measured once. Other products, such as those of attention, and the rest of the
graph take what they take.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import onnx_ir as ir

from ...errors import RecipeError, TargetUnavailableError
from ...targets import parse_target
from ...targets.base import BuildRequest, Target
from ..dimensions import Dim, Term
from ..dimensions.layout import leaves, size_after
from ..graph import Graph
from ..graph.cost import at_sizes
from ..graph.selection import label
from ..quantization.layers import Layer, as_layer, constant
from ..signature import Signature, TensorSpec
from .cost import Macs

if TYPE_CHECKING:
    from ..sources import Model

LEVELS = (1.0, 0.75, 0.5, 0.25)
"""Parts of a length that are measured."""

_CALLS_S = 0.05
"""Seconds that each entry of the table is run for, in runs whose median counts."""


class Stopwatch:
    """Times graphs on a target.

    Raises:
        RecipeError: the target takes no graph.
        TargetUnavailableError: the target cannot build or run here.
    """

    def __init__(self, target: Target, sizes: Mapping[str, int]) -> None:
        if target.capabilities.consumes != "graph":
            raise RecipeError(f"latency cannot be the goal of pruning on {target.name}, which takes no graph")
        state = target.availability()
        if not state.build or not state.run:
            raise TargetUnavailableError(
                f"latency cannot be measured on {target.name}: {state.reason}",
                hint=state.install or "choose ratio or macs as the goal",
            )
        self._target = target
        self._sizes = sizes
        self._random = np.random.default_rng(0)

    def milliseconds(self, *graphs: Graph) -> list[float]:
        """Median milliseconds of each, on random inputs, in turns."""
        with tempfile.TemporaryDirectory(prefix="enginesmith-") as name:
            runners = []
            for number, graph in enumerate(graphs):
                signature, sample = self._signature(graph), self._sample(graph)
                folder, cache = Path(name) / str(number), Path(name) / "cache"
                folder.mkdir()
                cache.mkdir(exist_ok=True)
                no_model = cast("Model", None)  # which targets that take graphs do not look at
                request = BuildRequest(graph, no_model, signature, "fp32", sample, folder, cache, lambda line: None)
                runners.append((self._target.runner(folder, self._target.build(request)), sample))
            bounds = [runner.bind(sample) for runner, sample in runners]
            times = _medians([bound.timed for bound in bounds])
            for runner, _ in runners:
                runner.close()
        return times

    def _signature(self, graph: Graph) -> Signature:
        main = graph.model.graph
        inputs, outputs = (
            tuple(TensorSpec(v.name or "", _dtype(v), self._shape(v)) for v in values)
            for values in ((v for v in main.inputs if not v.is_initializer()), main.outputs)
        )
        return Signature(inputs=inputs, outputs=outputs)

    def _sample(self, graph: Graph) -> dict[str, np.ndarray]:
        found = {}
        for value in graph.model.graph.inputs:
            if not value.is_initializer():
                shape = self._shape(value)
                whole = np.dtype(_dtype(value)).kind in "biu"
                array = self._random.integers(0, 2, shape) if whole else self._random.standard_normal(shape)
                found[value.name or ""] = array.astype(_dtype(value))
        return found

    def _shape(self, value: ir.Value) -> tuple[int, ...]:
        axes = value.shape or ()
        return tuple(axis if isinstance(axis, int) else self._sizes.get(str(axis.value), 1) for axis in axes)


class Latency:
    """Milliseconds of a graph as a function of the sizes of its dimensions.

    Args:
        graph: the whole graph.
        macs: its products.
        dims: dimensions that may shrink.
        target: text of the target, its options joined by ``+``.
        sizes: of the dynamic axes.
        progress: takes the fraction done.
    """

    def __init__(
        self,
        graph: Graph,
        macs: Macs,
        dims: Iterable[Dim],
        target: str,
        sizes: Mapping[str, int],
        progress: Callable[[float], None],
    ) -> None:
        self.stopwatch = Stopwatch(parse_target(target.replace("+", ",")), sizes)
        sized = {label(node): node for node in at_sizes(graph, sizes).model.graph}
        changing = set(dims)
        self._tables: list[_Table] = []
        self._of: dict[Dim, list[_Table]] = {}
        known: dict[object, _Grid] = {}
        for number, product in enumerate(macs.products):
            progress(number / len(macs.products))
            moving = {dim for term in product.axes for dim in leaves(term)} & changing
            layer = as_layer(sized[label(product.node)])
            if not moving or layer is None:
                continue
            out, into = product.axes[-2:]
            key = _key(layer)
            if key not in known:
                known[key] = _measured(layer, self.stopwatch, out.size, into.size)
            table = _Table(known[key], out, into)
            self._tables.append(table)
            for dim in moving:
                self._of.setdefault(dim, []).append(table)
        whole = self.stopwatch.milliseconds(graph)[0]
        self._rest = max(0.0, whole - sum(table.after({}) for table in self._tables))

    def total(self, sizes: Mapping[Dim, int]) -> float:
        """Milliseconds of the whole graph."""
        return self._rest + sum(table.after(sizes) for table in self._tables)

    def touched(self, dim: Dim, sizes: Mapping[Dim, int]) -> float:
        """Milliseconds of the layers that a dimension takes part in."""
        return sum(table.after(sizes) for table in self._of.get(dim, ()))


class _Grid:
    """Times at a few lengths of outputs and inputs; bilinear between them."""

    def __init__(self, outs: Sequence[int], ins: Sequence[int], times: np.ndarray) -> None:
        self._outs, self._ins, self._times = outs, ins, times

    def at(self, out: float, into: float) -> float:
        across = [float(np.interp(into, self._ins, row)) for row in self._times]
        return float(np.interp(out, self._outs, across))


class _Table:
    """The times of one layer as a function of the sizes of dimensions."""

    def __init__(self, grid: _Grid, out: Term, into: Term) -> None:
        self._grid, self._out, self._into = grid, out, into

    def after(self, sizes: Mapping[Dim, int]) -> float:
        return self._grid.at(size_after(self._out, sizes), size_after(self._into, sizes))


def _measured(layer: Layer, stopwatch: Stopwatch, out: int, into: int) -> _Grid:
    outs, ins = (sorted({max(1, round(length * level)) for level in LEVELS}) for length in (out, into))
    if layer.groups > 1:
        step = out // layer.groups if _is_depthwise(layer) else layer.groups
        outs = sorted({-(-length // step) * step for length in outs})
    times = np.zeros((len(outs), len(ins)))
    for (row, rows), (column, columns) in itertools.product(enumerate(outs), enumerate(ins)):
        times[row, column] = stopwatch.milliseconds(_alone(layer, rows, columns))[0]
    return _Grid(outs, ins, times)


def _is_depthwise(layer: Layer) -> bool:
    """Whether it loses a group where it loses a channel; others keep their groups."""
    return layer.groups > 1 and layer.load().shape[1] == 1


def _alone(layer: Layer, out: int, into: int) -> Graph:
    """A graph of this layer with other lengths of outputs and inputs, `into` in each group."""
    groups = out * layer.groups // len(layer.load()) if _is_depthwise(layer) else layer.groups
    weight = np.resize(layer.load(), (out, into, *layer.load().shape[2:])).astype(np.float32)
    x, y = layer.node.inputs[0], layer.node.outputs[0]
    assert x is not None
    shape = [axis if isinstance(axis, int) else 1 for axis in x.shape or ()]
    shape[layer.channel_axis(len(shape))] = into * groups
    source = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    stored = np.ascontiguousarray(layer.viewed(weight))
    tensors = [("weight", stored)]
    if len(layer.node.inputs) > 2 and layer.node.inputs[2] is not None:
        tensors.append(("bias", np.resize(constant(layer.node.inputs[2]), out).astype(np.float32)))
    values = [
        ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape(array.shape),
            const_value=ir.Tensor(array, name=name),
        )
        for name, array in tensors
    ]
    attributes = dict(layer.node.attributes)
    if groups != layer.groups:
        attributes["group"] = ir.AttrInt64("group", groups)
    node = ir.node(layer.node.op_type, [source, *values], attributes=attributes)
    result = node.outputs[0]
    result.name, result.type = "y", y.type
    if y.shape is not None:
        rank = len(y.shape)
        result.shape = ir.Shape([out if axis == layer.channel_axis(rank) else y.shape[axis] for axis in range(rank)])
    opset = layer.node.graph.opset_imports.get("", 17) if layer.node.graph is not None else 17
    made = ir.Graph([source], node.outputs, nodes=[node], initializers=values, opset_imports={"": opset}, name="layer")
    graph = Graph(ir.Model(made, ir_version=9))
    graph.infer()
    return graph


def _key(layer: Layer) -> object:
    x = layer.node.inputs[0]
    attributes = sorted((key, str(attribute.value)) for key, attribute in layer.node.attributes.items())
    return layer.node.op_type, layer.load().shape, str(x.shape if x is not None else None), str(attributes)


def _dtype(value: ir.Value) -> str:
    assert value.dtype is not None
    return str(value.dtype.numpy().name)


def _medians(timed: Sequence[Callable[[int], tuple[list[float], list[float] | None]]]) -> list[float]:
    """Median milliseconds of each candidate over rounds in turns, after a warm-up."""
    counts = []
    for run in timed:
        run(2)
        host, _ = run(3)
        counts.append(max(3, min(200, int(1e3 * _CALLS_S / 5 / max(float(np.median(host)), 1e-3)))))
    times: list[list[float]] = [[] for _ in timed]
    for _ in range(5):
        for number, (run, count) in enumerate(zip(timed, counts, strict=True)):
            host, device = run(count)
            times[number].append(float(np.median(device or host)))
    return [float(np.median(found)) for found in times]
