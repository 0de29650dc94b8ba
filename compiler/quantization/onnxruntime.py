"""Placement for ONNX Runtime on the CPU: uint8 activations, int8 weights, and only what its optimizer fuses.

ONNX Runtime turns DequantizeLinear -> f -> QuantizeLinear into an integer kernel where every operand of f is read
through DequantizeLinear and every use of its result goes through one QuantizeLinear. So:

    Conv, Gemm, MatMul              by a constant weight, always (QLinearConv, QGemm, QLinearMatMul)
    Add, Mul, Concat, pooling, ...  between two quantized nodes; elsewhere they would only add rounding
    Relu, Clip from zero            vanish in the range of the result: its zero point is 0
    MaxPool, Reshape, Transpose...  move bytes: result and operand share one range

A result that nobody reads as integers leaves Gemm and MatMul as float (QGemm, MatMulIntegerToFloat); Conv cannot do so.
The rules: onnxruntime/core/optimizer/qdq_transformer/selectors_actions/qdq_selectors.cc.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import onnx_ir as ir

from ...passes.base import Refusal
from ..graph import Graph
from ..graph.editing import is_constant
from ..graph.selection import label
from ..graph.verifier import subgraphs
from .plan import Bias, Plan, Use, Weight, merge_groups, read

_HEAVY = frozenset(("Conv", "Gemm", "MatMul"))
_FLOAT_RESULT = frozenset(("Gemm", "MatMul"))
_MOVING = frozenset((
    "Expand", "Flatten", "Gather", "GatherElements", "MaxPool", "Reshape", "Resize", "Slice", "Split", "Squeeze",
    "Tile", "Transpose", "Unsqueeze",
))  # fmt: skip
_PERMUTING = frozenset(("Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))
_UNARY = frozenset(("AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Softmax"))
_MANY = frozenset(("Add", "Concat", "Mul"))
_BEFORE_RELU = (_HEAVY | _UNARY | _MANY) - {"Concat"}
_NO_KERNEL = {
    "ConvTranspose": "ONNX Runtime has no int8 kernel for ConvTranspose",
    "GRU": "ONNX Runtime has no static int8 kernel for GRU",
    "LSTM": "ONNX Runtime has no static int8 kernel for LSTM: use quantize-dynamic",
    "RNN": "ONNX Runtime has no static int8 kernel for RNN",
}


def plan(graph: Graph, *, per_channel: bool = True, keep: Mapping[ir.Node, str] = MappingProxyType({})) -> Plan:
    """Decides what becomes integer in the main graph; shapes and types must be inferred, constants be initializers.

    Args:
        per_channel: one scale for each output channel of a weight; needs opset 13.
        keep: nodes that stay float, and why.
    """
    return _Planner(graph, keep).plan(per_channel=per_channel)


class _Planner:
    def __init__(self, graph: Graph, keep: Mapping[ir.Node, str]) -> None:
        self._graph = graph
        self._keep = keep
        self._refusals: list[Refusal] = []
        self._chosen: set[ir.Node] = set()

    def plan(self, *, per_channel: bool) -> Plan:
        self._choose()
        activations: dict[str, set[Use]] = collections.defaultdict(set)
        shared: list[list[str]] = []
        weights, biases = [], []
        for node in self._graph.model.graph:
            if node not in self._chosen:
                continue
            for use in _data(node):
                activations[_name(read(use))].add(use)
            results = [self._result(output) for output in node.outputs]
            for result in results:
                if self._integer(node, result):
                    activations[_name(result)].update(_uses(result))
            shared.append(_sharing(node, results))
            if node.op_type in _HEAVY:
                weight = Weight(Use(node, 1), _channel_axis(node) if per_channel else None)
                weights.append(weight)
                if len(node.inputs) > 2 and node.inputs[2] is not None:
                    biases.append(Bias(Use(node, 2), _name(read(Use(node, 0))), weight))
        return Plan(
            activations={name: frozenset(uses) for name, uses in activations.items() if uses},
            weights=tuple(weights),
            biases=tuple(biases),
            groups=merge_groups([name for name in names if name in activations] for names in shared),
            nodes=frozenset(self._chosen),
            refusals=tuple(self._refusals),
        )

    def _choose(self) -> None:
        """Takes every node that has a kernel, then drops light nodes that lie at an edge until none is left there."""
        for node in self._graph.model.graph:
            if any(True for _ in subgraphs(node)):
                self._refuse(node, f"the bodies of {node.op_type} stay float")
            elif (reason := self._why_not(node)) == "":
                self._chosen.add(node)
            elif reason is not None:
                self._refuse(node, reason)
        moving: set[ir.Node] = set()
        while edge := [node for node in self._chosen if node.op_type not in _HEAVY and not self._is_inside(node)]:
            self._chosen.difference_update(edge)
            moving.update(node for node in edge if node.op_type in _MOVING)
        for node in self._graph.model.graph:  # what is integer anyway is moved as such, whoever reads it
            if node in moving and self._gives_integers(self._source(read(_data(node)[0]))):
                self._chosen.add(node)

    def _why_not(self, node: ir.Node) -> str | None:
        """Why a node cannot be integer; empty where it can, None where that is nothing to tell."""
        if node.domain or not node.outputs or node.outputs[0].dtype != ir.DataType.FLOAT:
            return None
        if node in self._keep:
            return self._keep[node]
        if node.op_type in _HEAVY:
            return _why_not_heavy(node)
        if node.op_type in _NO_KERNEL:
            return _NO_KERNEL[node.op_type]
        light = node.op_type in _MOVING | _UNARY | _MANY
        return "" if light and self._has_kernel(node) else None

    def _has_kernel(self, node: ir.Node) -> bool:
        operands = [read(use) for use in _data(node)]
        if any(is_constant(value) for value in operands) or len(set(operands)) < len(operands):
            return False
        if node.op_type in _MANY:
            return len(operands) > 1
        if node.op_type == "MaxPool":
            return len(node.outputs) == 1 and self._graph.opset >= 12
        return "dilations" not in node.attributes or node.op_type not in _UNARY

    def _is_inside(self, node: ir.Node) -> bool:
        """Whether all that a node reads comes from chosen nodes, and a chosen node reads what it makes.

        What only moves data to chosen nodes may take it from anywhere: bytes are moved faster than floats.
        """
        if not self._integer_source(node):
            readers = _uses(node.outputs[0]) if node.op_type in _PERMUTING else []
            return bool(readers) and all(u.node in self._chosen and u in _data(u.node) for u in readers)
        return any(self._isread(self._result(output)) for output in node.outputs)

    def _integer_source(self, node: ir.Node) -> bool:
        return all(self._source(read(use)) in self._chosen for use in _data(node))

    def _gives_integers(self, node: ir.Node | None) -> bool:
        return node in self._chosen and any(self._integer(node, self._result(output)) for output in node.outputs)

    def _integer(self, node: ir.Node, result: ir.Value) -> bool:
        return node.op_type not in _FLOAT_RESULT or self._isread(result)

    def _isread(self, value: ir.Value) -> bool:
        return any(use in _data(use.node) for use in _uses(value) if use.node in self._chosen)

    def _result(self, value: ir.Value) -> ir.Value:
        """The value that stands for a node's result: past a Relu or Clip that vanishes in its range."""
        producer, uses = value.producer(), _uses(value)
        if producer is None or producer.op_type not in _BEFORE_RELU or len(uses) != 1:
            return value
        follower = uses[0].node
        return follower.outputs[0] if follower is not None and _is_relu(follower) else value

    def _source(self, value: ir.Value) -> ir.Node | None:
        """The node whose result a value is."""
        producer = value.producer()
        if producer is not None and _is_relu(producer) and (before := producer.inputs[0]) is not None:
            return before.producer() if self._result(before) is value else producer
        return producer

    def _refuse(self, node: ir.Node, reason: str) -> None:
        self._refusals.append(Refusal(reason, label(node)))


def _why_not_heavy(node: ir.Node) -> str:
    x, weight = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if is_constant(x) or not is_constant(weight) or weight is None or weight.shape is None:
        both = x is not None and weight is not None and not is_constant(x) and not is_constant(weight)
        return "both operands are activations" if both else f"{node.op_type} reads its weight as input 0"
    if bias is not None and not is_constant(bias):
        return "its bias is no constant"
    if node.op_type == "MatMul":
        return "" if len(weight.shape) == 2 else f"its weight has {len(weight.shape)} dimensions, not 2"
    if node.op_type == "Gemm" and node.attributes.get_int("transA", 0) == 1:
        return "its first operand is transposed"
    if node.op_type == "Gemm" and bias is not None:
        columns = weight.shape[_channel_axis(node)]
        if bias.shape is None or bias.shape.numpy() not in ((columns,), (1, columns)):
            return f"its bias has the shape {bias.shape}, not [{columns}]"
        if node.attributes.get_float("beta", 1.0) != 1:
            return "its bias has a factor (beta)"
    return ""


def _channel_axis(node: ir.Node) -> int:
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) == 1 else 1
    return 0 if node.op_type == "Conv" else 1


def _data(node: ir.Node) -> list[Use]:
    """The operands that are activations: not weights, shapes or indices."""
    count = len(node.inputs) if node.op_type in _MANY else 1
    return [Use(node, place) for place in range(count)]


def _sharing(node: ir.Node, results: list[ir.Value]) -> list[str]:
    """Names that must have one range, or that gain by it: what goes to a Concat alone is rounded once, not twice."""
    if node.op_type in _MOVING:
        return [_name(read(Use(node, 0))), *map(_name, results)]
    if node.op_type == "Concat":
        operands = [read(use) for use in _data(node)]
        return [*(_name(value) for value in operands if len(_uses(value)) == 1), *map(_name, results)]
    return []


def _is_relu(node: ir.Node) -> bool:
    """Whether a node only cuts off below zero, and perhaps above a constant."""
    if node.domain:
        return False
    if node.op_type == "Clip" and len(node.inputs) > 1 and is_constant(low := node.inputs[1]):
        return low is not None and low.const_value is not None and bool(low.const_value.numpy() == 0)
    return node.op_type == "Relu" or (node.op_type == "Clip" and node.attributes.get_float("min", -1.0) == 0)


def _uses(value: ir.Value) -> list[Use]:
    outputs: Iterator[Use] = iter(())
    if value.is_graph_output() and value.graph is not None:
        outputs = (Use(None, place) for place, output in enumerate(value.graph.outputs) if output is value)
    return [*(Use(node, place) for node, place in value.uses()), *outputs]


def _name(value: ir.Value) -> str:
    return value.name or ""
