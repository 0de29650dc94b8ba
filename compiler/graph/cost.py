"""What each node costs: multiply-adds and bytes of weights, by shapes inferred at given sizes of the dynamic axes.

                    multiply-adds
MatMul, Gemm        elements of the output x length of the dimension that is summed over
Conv                elements of the output x input channels of a group x kernel
ConvTranspose       elements of the input x output channels of a group x kernel
LSTM, GRU, RNN      steps x rows x (elements of W + elements of R)
Attention           elements of the scores x (head size of Q + head size of V)
Einsum              product of all its dimensions
other               0

Quantized and fused operators, those of ONNX Runtime too, count as the ones that they stand for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from ...errors import GraphError
from .graph import Graph
from .schemas import MICROSOFT
from .selection import label

_COUNTING = frozenset((ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.STRING))


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one node. A weight that several nodes read counts for each of them."""

    macs: int = 0
    weight_bytes: int = 0


def costs(graph: Graph, sizes: Mapping[str, int]) -> dict[str, Cost]:
    """Cost by the node's label, subgraphs counted once. Where a shape stays unknown, multiply-adds count as 0.

    Args:
        sizes: of the dynamic axes, by name.
    """
    sized = at_sizes(graph, sizes)
    found: dict[str, Cost] = {}
    for node in sized.nodes():
        before = found.get(label(node), Cost())
        found[label(node)] = Cost(before.macs + multiply_adds(node), before.weight_bytes + _weight_bytes(node))
    return found


def at_sizes(graph: Graph, sizes: Mapping[str, int]) -> Graph:
    """A copy whose shapes are those at given sizes of the dynamic axes, as far as they can be inferred."""
    sized = graph.clone()
    main = sized.model.graph
    for value in (*main.inputs, *main.outputs, *(output for node in sized.nodes() for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_size(axis, sizes) for axis in value.shape])
    try:
        sized.infer()
    except GraphError:  # a shape that is fixed inside contradicts these sizes: what the graph itself knows must do
        return graph
    return sized


def share(costs: Mapping[str, Cost], labels: Iterable[str]) -> float:
    """The share of all multiply-adds that these nodes have; of the bytes of weights where nothing multiplies."""
    chosen = [costs[name] for name in set(labels) & costs.keys()]
    for measure in ("macs", "weight_bytes"):
        if total := sum(getattr(cost, measure) for cost in costs.values()):
            return float(sum(getattr(cost, measure) for cost in chosen) / total)
    return 0.0


def parameters(graph: Graph) -> int:
    """Elements of all weights: of the constants that are no counts, as shapes and indices of 32 and 64 bits are."""
    tensors = [value.const_value for part in graph.graphs() for value in part.initializers.values()]
    tensors += [node.attributes["value"].as_tensor() for node in graph.nodes() if "value" in node.attributes]
    return sum(tensor.size for tensor in tensors if tensor is not None and tensor.dtype not in _COUNTING)


def _size(axis: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int | ir.SymbolicDim:
    return axis if isinstance(axis, int) else sizes.get(str(axis.value), axis)


def _weight_bytes(node: ir.Node) -> int:
    weights = {value for value in node.inputs if value is not None and value.const_value is not None}
    return sum(value.const_value.nbytes for value in weights if value.const_value is not None)


def multiply_adds(node: ir.Node) -> int:
    """Of one node, by the shapes that it has; 0 where one is not known."""
    counter = (_COUNTERS if not node.domain else _CONTRIBUTED if node.domain == MICROSOFT else {}).get(node.op_type)
    if counter is None:
        return 0
    try:
        return counter(node)
    except _UnknownShapeError:
        return 0


class _UnknownShapeError(Exception):
    """A shape that inference has not found."""


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    if value is None or value.shape is None or not all(isinstance(axis, int) for axis in value.shape):
        raise _UnknownShapeError
    return tuple(int(axis) for axis in value.shape)  # type: ignore[arg-type]


def _matmul(node: ir.Node) -> int:
    return math.prod(_shape(node.outputs[0])) * _shape(node.inputs[0])[-1]


def _gemm(node: ir.Node) -> int:
    transposed = node.attributes.get_int("transA", 0)
    return math.prod(_shape(node.outputs[0])) * _shape(node.inputs[0])[0 if transposed else 1]


def _conv(node: ir.Node) -> int:
    return math.prod(_shape(node.outputs[0])) * math.prod(_shape(node.inputs[1])[1:])


def _quantized_conv(node: ir.Node) -> int:
    return math.prod(_shape(node.outputs[0])) * math.prod(_shape(node.inputs[3])[1:])


def _fused_matmul(node: ir.Node) -> int:
    transposed = node.attributes.get_int("transA", 0)
    return math.prod(_shape(node.outputs[0])) * _shape(node.inputs[0])[-2 if transposed else -1]


def _blockwise_matmul(node: ir.Node) -> int:
    return math.prod(_shape(node.inputs[0])) * node.attributes.get_int("N", 0)


def _projected_attention(node: ir.Node) -> int:
    rows, length, width = _shape(node.inputs[0])
    outputs = _shape(node.inputs[1])[1]
    return rows * length * (width * outputs + 2 * length * (outputs // 3))


def _conv_transpose(node: ir.Node) -> int:
    return math.prod(_shape(node.inputs[0])) * math.prod(_shape(node.inputs[1])[1:])


def _recurrent(node: ir.Node) -> int:
    first, second, _ = _shape(node.inputs[0])
    return first * second * (math.prod(_shape(node.inputs[1])) + math.prod(_shape(node.inputs[2])))


def _attention(node: ir.Node) -> int:
    query, key, value = (_shape(node.inputs[index]) for index in range(3))
    if len(query) == 4:
        rows, heads, length, size = query
        return rows * heads * length * key[2] * (size + value[3])
    rows, length, width = query
    groups = node.attributes.get_int("q_num_heads", 1) // node.attributes.get_int("kv_num_heads", 1)
    return rows * length * key[1] * (width + value[2] * groups)


def _einsum(node: ir.Node) -> int:
    terms = node.attributes.get_string("equation", "").partition("->")[0].replace(" ", "").split(",")
    sizes: dict[str, int] = {}
    for term, value in zip(terms, node.inputs, strict=True):
        letters, shape = term.replace("...", ""), _shape(value)
        sizes.update(zip(letters, shape[len(shape) - len(letters) :], strict=True))
        sizes["..."] = max(sizes.get("...", 1), math.prod(shape[: len(shape) - len(letters)]))
    return math.prod(sizes.values())


_COUNTERS = {
    "Attention": _attention,
    "Conv": _conv,
    "ConvInteger": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "GRU": _recurrent,
    "Gemm": _gemm,
    "LSTM": _recurrent,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearConv": _quantized_conv,
    "QLinearMatMul": _matmul,
    "RNN": _recurrent,
}

_CONTRIBUTED = {
    "Attention": _projected_attention,
    "DynamicQuantizeLSTM": _recurrent,
    "DynamicQuantizeMatMul": _matmul,
    "FusedConv": _conv,
    "FusedGemm": _gemm,
    "FusedMatMul": _fused_matmul,
    "MatMulIntegerToFloat": _matmul,
    "MatMulNBits": _blockwise_matmul,
    "MultiHeadAttention": _attention,
    "QAttention": _projected_attention,
}
"""Of ONNX Runtime."""
