"""Quantizes MatMul, Gemm, LSTM and GRU to int8 with activations quantized while running: for ONNX Runtime's CPU.

    Gemm(x, W, b)     ->  DynamicQuantizeLinear, MatMulInteger, Cast, Mul, Mul, Add
    LSTM(x, W, R)     ->  com.microsoft.DynamicQuantizeLSTM
    GRU(x, W, R)      ->  the products with W at once, and a Scan over those with R

It needs no data, but is more accurate with some, see `smooth`. Weights have one scale for each output channel. What is
refused stays float, each node with its reason: weights that are not constant, weights too small to gain, nodes in
subgraphs, RNN (ONNX Runtime has no integer kernel) and Conv (its integer kernel is slower than float).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir

from ..compiler.graph import Graph
from ..compiler.graph.selection import label, select
from ..compiler.quantization.candidates import already, exempt, prepared, taken_over, too_small
from ..compiler.quantization.constants import Constants
from ..compiler.quantization.dynamic import OPSET, Dynamic
from ..compiler.quantization.linear import OPERATORS, linear
from ..compiler.quantization.patch import Patcher
from ..compiler.quantization.qdq import quantized_nodes
from ..compiler.quantization.saturation import saturates
from ..compiler.quantization.smooth import ALPHA, check_alpha, inputs, is_convolutional, smooth
from .base import Context, Pass, PassResult, Refusal

_CONVOLUTIONS = frozenset(("Conv", "ConvTranspose"))


@dataclasses.dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Quantizes matrix products, LSTMs and GRUs whose weights are constant; activations get their ranges while running.

    Attributes:
        smooth: SmoothQuant's alpha for MatMul and Gemm. It moves outlier channels of activations, which share one
            scale, into the weights, and needs calibration data. 0 leaves it out. None: 0.8 where there is such data
            and products outnumber convolutions.
        keep: names or globs of nodes that stay float.
        reduce_range: 7 bits for weights. None: where this processor has no VNNI and would saturate.
    """

    name: ClassVar[str] = "quantize-dynamic"
    smooth: float | None = None
    keep: tuple[str, ...] = ()
    reduce_range: bool | None = None

    def __post_init__(self) -> None:
        check_alpha(self.smooth)

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Quantizes in place.

        Raises:
            RecipeError: `keep` has a pattern that matches no node, or `smooth` is asked for without calibration.
            DataError, GraphError: the data does not run through the graph.
            TargetUnavailableError: a weight has to be computed and ONNX Runtime is not installed.
        """
        work = prepared(graph)
        run = _Run(work, self)
        if not quantized_nodes(work):
            run.smooth(context)
        run.visit()
        if not any(name.endswith("quantized") for name in run.changes):
            return PassResult(modified=False, refusals=tuple(run.refusals))
        return taken_over(graph, work, run.changes, run.refusals)


class _Run:
    def __init__(self, graph: Graph, options: QuantizeDynamic) -> None:
        self.changes: collections.Counter[str] = collections.Counter()
        self.refusals: list[Refusal] = []
        self._graph = graph
        self._smooth = options.smooth
        self._keep = select(graph, options.keep)
        self._constants = Constants(graph)
        reduce_range = saturates() if options.reduce_range is None else options.reduce_range
        self._dynamic = Dynamic(Patcher(graph), self._constants, reduce_range=reduce_range)

    def smooth(self, context: Context) -> None:
        """Moves outlier channels of activations into the weights."""
        asked = self._smooth
        if asked == 0 or (asked is None and (context.calibration is None or is_convolutional(self._graph))):
            return
        calibration = context.require_calibration("smooth", "to see the channels of activations")
        statistics = calibration.statistics(self._graph, inputs(self._graph))
        changes, refusals = smooth(self._graph, statistics, ALPHA if asked is None else asked)
        self.changes.update(changes)
        self.refusals.extend(refusals if asked else [])
        self._graph.infer()

    def visit(self) -> None:
        """Quantizes what can be, and says why the rest is not."""
        self.refusals.extend(map(Refusal, _about_the_graph(self._graph)))
        if self._graph.opset < OPSET:
            return
        for node in list(self._graph.nodes()):
            if node.domain or not (node.op_type in OPERATORS or node.op_type in ("GRU", "LSTM", "RNN")):
                continue
            reason = exempt(node, self._graph, self._keep) or self._quantize(node)
            if reason:
                self.refusals.append(Refusal(reason, label(node)))
            else:
                self.changes[f"{node.op_type} quantized"] += 1

    def _quantize(self, node: ir.Node) -> str | None:
        if node.op_type == "RNN":
            return "ONNX Runtime has no integer RNN"
        x = node.inputs[0]
        if x is None or x.dtype != ir.DataType.FLOAT:
            return f"its input is {x.dtype.name if x and x.dtype else 'of unknown type'}, integer kernels take float32"
        if node.op_type == "LSTM":
            return self._dynamic.lstm(node)
        if node.op_type == "GRU":
            return self._dynamic.gru(node)
        found = linear(node, self._constants)
        if isinstance(found, str):
            return found
        if reason := too_small(found.weight):
            return reason
        self._dynamic.linear(found)
        return None


def _about_the_graph(graph: Graph) -> Iterator[str]:
    if graph.opset < OPSET:
        yield f"opset {graph.opset} has no DynamicQuantizeLinear; opset {OPSET} is the first"
    yield from already(graph)
    if convolutions := sum(node.op_type in _CONVOLUTIONS for node in graph.nodes()):
        yield f"{convolutions} of Conv stay: its dynamic kernel runs at 0.2 to 0.3 of float's speed, static ones gain"
