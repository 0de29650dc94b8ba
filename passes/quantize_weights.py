"""Stores the weights of MatMul and Gemm in 8 or 4 bits, for models that wait for their weights: decoders, one by one.

    y = x @ W + b     ->  MatMulNBits(x, W in blocks) + b                       for ONNX Runtime
                      ->  x @ DequantizeLinear(W in INT4 blocks or INT8) + b    for TensorRT 10 and newer

Activations stay float. Each block of rows has a scale of its own, the one of the least squared error. What is refused
stays float, each node with its reason: weights that are not constant, weights too small to gain, nodes in subgraphs.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from ..compiler.calibration import Calibration
from ..compiler.graph import Graph
from ..compiler.graph.selection import label, select
from ..compiler.quantization.candidates import already, exempt, prepared, taken_over, too_small
from ..compiler.quantization.constants import Constants
from ..compiler.quantization.hessians import hessians
from ..compiler.quantization.layers import Layer, as_layer
from ..compiler.quantization.linear import OPERATORS, Linear, linear
from ..compiler.quantization.patch import Patcher
from ..compiler.quantization.weightonly import BLOCK_OPSET, Scheme, WeightOnly
from .base import Context, Pass, PassResult, Refusal

_BLOCKS = (16, 32, 64, 128, 256)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclasses.dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Stores weights in `bits` bits, in the form that a runtime has kernels for.

    Attributes:
        bits: 8 or 4.
        scheme: the runtime.
        block: rows that share a scale. None: 32 for 4 bits with ONNX Runtime, where 128 is 1.3 times faster and 3 dB
            worse; else 128, or less where a weight makes no whole blocks of it. TensorRT's INT8 has one scale a column.
        symmetric: no zero points. None: where the runtime takes none. With them the error is smaller, and
            ONNX Runtime's CPU takes longer for the products of a single token.
        tables: store tables of Gather too, in INT8 with a scale for each row, a quarter of the memory.
            For ONNX Runtime, which then finds rows at 0.4 to 0.8 of the speed.
        rounding: "gptq" rounds blocks so that products change least on calibration data; "nearest" needs no data.
        accuracy_level: how ONNX Runtime's CPU multiplies: 4 in int8, 0 in float, which is 20 times slower at 8 bits.
        keep: names or globs of nodes that stay float.
    """

    name: ClassVar[str] = "quantize-weights"
    bits: int = 8
    scheme: Scheme = "onnxruntime"
    block: int | None = None
    symmetric: bool | None = None
    tables: bool = False
    rounding: Literal["nearest", "gptq"] = "nearest"
    accuracy_level: int = 4
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits is 4 or 8, not {self.bits}")
        if self.block is not None and self.block not in _BLOCKS:
            raise ValueError(f"block is one of {', '.join(map(str, _BLOCKS))}, not {self.block}")
        if self.accuracy_level not in range(5):
            raise ValueError(f"accuracy_level is 0 to 4, not {self.accuracy_level}")
        if self.symmetric is False and self.scheme == "tensorrt":
            raise ValueError("TensorRT takes no zero points: symmetric=false is for onnxruntime")

    def block_size(self, rows: int) -> int:
        """Rows that share a scale in a weight of so many."""
        if self.block is not None:
            return self.block
        sizes = (32,) if self.bits == 4 and self.scheme == "onnxruntime" else (128, 64, 32)
        return next((size for size in sizes if rows % size == 0), sizes[0])

    @property
    def calibrates(self) -> bool:
        """For GPTQ, which needs to see what weights are multiplied with."""
        return self.rounding == "gptq"

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Quantizes in place.

        Raises:
            RecipeError: `keep` has a pattern that matches no node, or rounding=gptq is asked for without calibration.
            GraphError: the data does not run through the graph.
            TargetUnavailableError: something has to be computed and ONNX Runtime is not installed.
        """
        calibration = None
        if self.rounding == "gptq":
            calibration = context.require_calibration("rounding=gptq", "to see what weights are multiplied with")
        if self.scheme == "tensorrt" and self.bits == 4 and graph.opset < BLOCK_OPSET:
            reason = f"opset {graph.opset} has no INT4 in blocks: run opset:least={BLOCK_OPSET} first"
            return PassResult(modified=False, refusals=(Refusal(reason),))
        work = prepared(graph)
        run = _Run(work, self)
        run.visit(calibration)
        if not run.changes:
            return PassResult(modified=False, refusals=tuple(run.refusals))
        return taken_over(graph, work, run.changes, run.refusals)


class _Run:
    def __init__(self, graph: Graph, options: QuantizeWeights) -> None:
        self.changes: collections.Counter[str] = collections.Counter()
        self.refusals = [Refusal(reason) for reason in already(graph)]
        self._graph = graph
        self._options = options
        self._keep = select(graph, options.keep)
        self._constants = Constants(graph)
        self._weights = WeightOnly(
            Patcher(graph),
            options.scheme,
            options.bits,
            symmetric=options.scheme == "tensorrt" if options.symmetric is None else options.symmetric,
            accuracy_level=options.accuracy_level,
        )

    def visit(self, calibration: Calibration | None) -> None:
        """Quantizes what can be, and says why the rest is not; with calibration by GPTQ."""
        found: list[Linear] = []
        for node in self._graph.nodes():
            if node.domain or node.op_type not in OPERATORS:
                continue
            candidate = exempt(node, self._graph, self._keep) or self._candidate(node)
            if isinstance(candidate, str):
                self.refusals.append(Refusal(candidate, label(node)))
            else:
                found.append(candidate)
        if calibration is not None:
            self._round(found, calibration)
        self._tables()
        for one in found:
            self._weights.replace(one, self._options.block_size(len(one.weight)))
            self.changes[f"{one.node.op_type} quantized"] += 1

    def _tables(self) -> None:
        for node in list(self._graph.model.graph):
            if node.op_type != "Gather" or node.domain or node.attributes.get_int("axis", 0) != 0:
                continue
            array = self._constants.array(node.inputs[0])
            if (
                array is None
                or ir.DataType.from_numpy(array.dtype) not in _FLOATS
                or array.ndim != 2
                or too_small(array)
            ):
                continue
            if reason := exempt(node, self._graph, self._keep) or self._not_stored(array):
                self.refusals.append(Refusal(reason, label(node)))
            else:
                self._weights.table(node, array)
                self.changes["tables quantized"] += 1

    def _not_stored(self, table: np.ndarray) -> str | None:
        if not self._options.tables:
            return f"its table of {table.nbytes / 1e6:.0f} MB stays float: tables=true stores a quarter of it"
        if self._options.scheme == "tensorrt":
            return "its table stays float: TensorRT takes INT8 before DequantizeLinear alone"
        return None if np.isfinite(table).all() else "its table holds NaN or Inf"

    def _round(self, found: list[Linear], calibration: Calibration) -> None:
        if self._options.scheme == "tensorrt" and self._options.bits == 8:
            self.refusals.append(Refusal("rounded to nearest: INT8 for TensorRT is not in blocks"))
            return
        layers: dict[Layer, Linear] = {}
        for one in found:
            if (layer := as_layer(one.node)) is not None:
                layers[layer] = one
            else:
                self.refusals.append(Refusal("rounded to nearest: not float32, or with factors", label(one.node)))
        for alike, (hessian, *_) in hessians(self._graph, list(layers), calibration.limited()):
            for layer in alike:
                weight = layers[layer].weight
                self._weights.round(layers[layer], self._options.block_size(len(weight)), hessian)
                self.changes["weights rounded by GPTQ"] += 1

    def _candidate(self, node: ir.Node) -> Linear | str:
        x = node.inputs[0]
        if x is None or x.dtype not in _FLOATS:
            return (
                f"its input is {x.dtype.name if x and x.dtype else 'of unknown type'}, kernels take float32 or float16"
            )
        found = linear(node, self._constants)
        if isinstance(found, str):
            return found
        if reason := too_small(found.weight):
            return reason
        rows = len(found.weight)
        block = self._options.block_size(rows)
        if self._options.scheme == "tensorrt" and self._options.bits == 4 and rows % block:
            return f"its {rows} rows make no whole blocks of {block}"
        return found
