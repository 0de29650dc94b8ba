"""Placement for TensorRT: symmetric 8-bit activations, one scale a tensor; weights, one a channel; the rest is fp16.

TensorRT runs a layer on 8-bit numbers where DequantizeLinear stands before it, and lets it write 8-bit numbers where
nothing but QuantizeLinear follows. It moves QuantizeLinear back to where data comes from, and DequantizeLinear on to
where it goes, across layers that only move data. So Q/DQ stands, and stands nowhere else,

    x - Q/DQ - Conv, Gemm, MatMul                       before what multiplies a constant
    skip - Q/DQ - Add - Relu, Conv - Add                none between Conv and Add, so that the three are one kernel
    x - Q/DQ - AveragePool, GlobalAveragePool           between 8-bit layers
    a, b - Q/DQ - Concat - Q/DQ                         with one scale, so that a and b are written in place
    q, k - Q/DQ - MatMul - Softmax - Q/DQ - MatMul - v  with `attention`: all four operands, or it is not one kernel

MaxPool, Reshape, Transpose and their like need none of their own. A mean over all positions by ReduceMean would read
floats: it is to be GlobalAveragePool first, see `forms.pool_means`. Biases stay float: TensorRT takes no int32. Sums
and normalizations of transformers stay in fp16: they cost little, and their outliers leave no range to all other
numbers.

Sources: NVIDIA, "Working with Quantized Types", Q/DQ placement; the layers that TensorRT-RTX reports.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

from ...passes.base import Refusal
from ..graph import Graph
from ..graph.editing import is_constant
from ..graph.selection import label
from ..graph.verifier import subgraphs
from .attention import Attention, attentions
from .plan import Plan, Use, Weight, merge_groups
from .regions import REASON, around_attention
from .tensorrt_limits import PRODUCTS, Limits, channel_axis, limits

LONGEST_INT8_ATTENTION = 512
"""Keys that the fused int8 kernel of attention takes."""

_MOVING = frozenset((
    "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Reshape", "Slice",
    "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
))  # fmt: skip
_AVERAGING = frozenset(("AveragePool", "GlobalAveragePool"))
_EPILOGUE = frozenset(("Clip", "LeakyRelu", "Mul", "PRelu", "Relu", "Sigmoid"))
"""What is computed within the kernel of the product before it."""


def plan(
    graph: Graph,
    *,
    dtype: ir.DataType = ir.DataType.INT8,
    per_channel: bool = True,
    attention: bool = False,
    regions: bool = True,
    keep: Mapping[ir.Node, str] = MappingProxyType({}),
) -> Plan:
    """Decides what becomes 8-bit in the main graph; shapes and types must be inferred, constants be initializers.

    Args:
        dtype: INT8 or FLOAT8E4M3FN.
        per_channel: one scale for each output channel of a weight; needs opset 13.
        attention: whether the products with Softmax between them become 8-bit too.
        regions: whether any product becomes 8-bit that is connected with attention, see `regions`.
        keep: nodes that stay float, and why.
    """
    if not regions:
        keep = dict.fromkeys(around_attention(list(graph.model.graph)), REASON) | dict(keep)
    return Planner(graph, dtype, keep, limits(dtype), attention=attention).plan(per_channel=per_channel)


class Planner:
    """Decides for one graph, once."""

    def __init__(
        self, graph: Graph, dtype: ir.DataType, keep: Mapping[ir.Node, str], limits: Limits, *, attention: bool
    ) -> None:
        self._nodes = list(graph.model.graph)
        self._dtype = dtype
        self._keep = keep
        self._limits = limits
        self._attention = attention
        self._uses: dict[ir.Value, set[Use]] = collections.defaultdict(set)
        self._weighted: list[ir.Node] = []
        self._chosen: set[ir.Node] = set()
        self._summed: set[ir.Node] = set()
        self._refusals: list[Refusal] = []
        self._groups: list[frozenset[str]] = []

    def plan(self, *, per_channel: bool) -> Plan:
        """What becomes 8-bit, with symmetric activations."""
        self._products()
        self._residuals()
        self._averages()
        self._concats()
        self._move()
        weights = [Weight(Use(n, 1), channel_axis(n) if per_channel else None, self._dtype) for n in self._weighted]
        return Plan(
            activations={_name(value): frozenset(uses) for value, uses in self._uses.items()},
            weights=tuple(weights),
            groups=merge_groups(self._groups),
            dtype=self._dtype,
            symmetric=True,
            nodes=frozenset(self._chosen),
            refusals=tuple(self._refusals),
        )

    def _products(self) -> None:
        found = list(attentions(self._nodes))
        parts = {node for attention in found for node in (attention.scores, attention.mixed)}
        for node in self._nodes:
            if any(True for _ in subgraphs(node)):
                self._refuse(node, f"the bodies of {node.op_type} stay float")
            elif node.op_type in self._limits.no_kernel and not node.domain:
                self._refuse(node, self._limits.no_kernel[node.op_type])
            elif node.op_type in PRODUCTS and not node.domain and node not in parts:
                self._product(node)
        for attention in found:
            reason = self._why_no_attention(attention)
            for node in (attention.scores, attention.mixed):
                if reason:
                    self._refuse(node, reason)
                elif node not in self._chosen:
                    self._choose(node, 0, 1)

    def _residuals(self) -> None:
        """Quantizes what is added to a convolution's result."""
        depths = self._depths()
        for node in self._nodes:
            if node.op_type != "Add" or node.domain or node in self._keep:
                continue
            mains = [place for place, value in enumerate(node.inputs) if self._ends_in_convolution(value)]
            if not mains or not _alike(*node.inputs):
                continue
            # Of two convolutions the one at the end of the longer branch; the other projects the skip branch.
            main = max(mains, key=lambda place: depths[node.inputs[place]])
            self._read(node, 1 - main)
            self._summed.add(node)

    def _averages(self) -> None:
        for node in self._nodes:
            if node.op_type in _AVERAGING and not node.domain and node not in self._keep:
                source = node.inputs[0]
                if source in self._narrow() and (source in self._uses or self._is_read(node.outputs[0])):
                    self._choose(node, 0)

    def _concats(self) -> None:
        narrow = self._narrow()
        for node in reversed(self._nodes):  # so that what reads a nested one is known
            if node.op_type != "Concat" or node.domain or node in self._keep or node not in _producers(narrow):
                continue
            result = node.outputs[0]
            if not self._is_read(result) or any(is_constant(value) for value in node.inputs):
                continue
            self._read(node, *range(len(node.inputs)))
            shared = [value for value in (*node.inputs, result) if value in self._uses]
            self._groups.append(frozenset(map(_name, shared)))

    def _move(self) -> None:
        """Moves no Q/DQ, which TensorRT does by itself."""

    def _product(self, node: ir.Node) -> None:
        if node in self._keep:
            self._refuse(node, self._keep[node])
        elif not is_constant(node.inputs[1]):
            self._refuse(node, "both operands are activations")
        elif reason := self._limits.why_not(node):
            self._refuse(node, reason)
        else:
            self._choose(node, 0)
            self._weighted.append(node)

    def _why_no_attention(self, attention: Attention) -> str:
        for node in (attention.scores, attention.mixed):
            if node in self._keep:
                return self._keep[node]
        if not self._attention:
            return self._limits.attention
        if attention.guarded:
            return "its softmax is guarded against rows without any key, and would not be one 8-bit kernel"
        longest = LONGEST_INT8_ATTENTION if self._dtype == ir.DataType.INT8 else attention.keys
        if attention.keys is not None and longest is not None and attention.keys > longest:
            return f"attention over {attention.keys} keys; the fused 8-bit kernel takes {longest}"
        return ""

    def _ends_in_convolution(self, value: ir.Value | None) -> bool:
        """Whether this is the result of a quantized convolution that one node alone reads."""
        if value is None or value.is_graph_output() or len(value.uses()) != 1:
            return False
        producer = value.producer()
        return producer in self._chosen and producer.op_type == "Conv"

    def _depths(self) -> Mapping[ir.Value | None, int]:
        """How many products lie on the longest way to a value."""
        depths: dict[ir.Value | None, int] = collections.defaultdict(int)
        for node in self._nodes:
            depth = max((depths[value] for value in node.inputs), default=0) + (node in self._chosen)
            depths.update(dict.fromkeys(node.outputs, depth))
        return depths

    def _narrow(self) -> set[ir.Value]:
        """Values that 8-bit layers can write as 8-bit numbers."""
        narrow: set[ir.Value] = set()
        for node in self._nodes:
            data = [value for value in node.inputs if _is_data(value)]
            passes = node.op_type in _MOVING | _EPILOGUE and not node.domain and bool(data)
            if node in self._chosen | self._summed or (passes and all(value in narrow for value in data)):
                narrow.update(node.outputs)
        return narrow

    def _is_read(self, value: ir.Value) -> bool:
        """Whether an 8-bit layer reads a value, past moved data."""
        moving = (node for node, _ in value.uses() if node.op_type in _MOVING and not node.domain)
        return value in self._uses or any(self._is_read(output) for node in moving for output in node.outputs)

    def _choose(self, node: ir.Node, *places: int) -> None:
        self._read(node, *places)
        self._chosen.add(node)

    def _read(self, node: ir.Node, *places: int) -> None:
        for place in places:
            if (value := node.inputs[place]) is not None:
                self._uses[value].add(Use(node, place))

    def _refuse(self, node: ir.Node, reason: str) -> None:
        self._refusals.append(Refusal(reason, label(node)))


def _is_data(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT and not is_constant(value)


def _alike(first: ir.Value | None, second: ir.Value | None) -> bool:
    """Whether two activations have one shape, as far as is known: a sum that broadcasts is no residual."""
    if first is None or second is None or first is second or not (_is_data(first) and _is_data(second)):
        return False
    known = first.shape is not None and second.shape is not None
    return not known or [str(size) for size in first.shape or ()] == [str(size) for size in second.shape or ()]


def _producers(values: set[ir.Value]) -> set[ir.Node | None]:
    return {value.producer() for value in values}


def _name(value: ir.Value | None) -> str:
    return (value.name if value is not None else None) or ""
