"""What a target wants quantized: uses of activations, constants, biases, and which values share one scale.

A plan is made by `onnxruntime.plan` or `tensorrt.plan` on the graph that is to be rewritten, and applied by
`qdq.insert`. It holds live nodes of that graph; values are told by name, as calibration tells them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import onnx_ir as ir

from ...passes.base import Refusal


class Use(NamedTuple):
    """A place that reads a value.

    Attributes:
        node: the reader; None for an output of the main graph.
        place: which of the node's inputs, or which of the graph's outputs.
    """

    node: ir.Node | None
    place: int


@dataclasses.dataclass(frozen=True)
class Weight:
    """A constant operand that becomes a quantized initializer behind DequantizeLinear.

    Attributes:
        use: the node that reads it, and as which input.
        axis: axis of the output channels, one scale each; None for one scale.
        dtype: of the quantized tensor; symmetric.
    """

    use: Use
    axis: int | None
    dtype: ir.DataType = ir.DataType.INT8

    @property
    def value(self) -> ir.Value:
        """The constant as it is in the graph now."""
        return read(self.use)


@dataclasses.dataclass(frozen=True)
class Bias:
    """A bias that becomes int32, in steps of scale of the input times scale of the weight.

    Attributes:
        use: the node that reads it, and as which input.
        input: name of the activation that the node multiplies; a key of `Plan.activations`.
        weight: what it is multiplied with; one of `Plan.weights`.
    """

    use: Use
    input: str
    weight: Weight

    @property
    def value(self) -> ir.Value:
        """The constant as it is in the graph now."""
        return read(self.use)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where Q/DQ goes.

    Attributes:
        activations: for each activation by name, the uses that read it through QuantizeLinear and DequantizeLinear.
            They share one pair of these; uses that are not listed read the float value.
        weights: constants that are quantized offline. Uses of one constant with equal axis and dtype share the result.
        biases: biases that become int32; biases that are not listed stay float.
        groups: names of activations that take one common range, so that moving data between them is free. Disjoint.
        dtype: of quantized activations.
        symmetric: whether zero is their zero point (128 for uint8).
        padded: names of activations that convolutions read with padding, and that become symmetric int8 in any case
            where they reach about as far below zero as above it.
        nodes: nodes that compute in low precision once the engine has fused the graph.
        refusals: nodes that stay float, with the reason.
    """

    activations: Mapping[str, frozenset[Use]]
    weights: tuple[Weight, ...] = ()
    biases: tuple[Bias, ...] = ()
    groups: tuple[frozenset[str], ...] = ()
    dtype: ir.DataType = ir.DataType.UINT8
    symmetric: bool = False
    padded: frozenset[str] = frozenset()
    nodes: frozenset[ir.Node] = frozenset()
    refusals: tuple[Refusal, ...] = ()

    def group_of(self, name: str) -> frozenset[str]:
        """The activations that share the range of this one, itself among them."""
        return next((group for group in self.groups if name in group), frozenset((name,)))


def first_layers(graph: ir.Graph, plan: Plan) -> set[ir.Node]:
    """Nodes with quantized weights whose input depends on no other such node; none where all are such."""
    layers = {weight.use.node for weight in plan.weights}
    behind: set[ir.Node] = set()
    first = set()
    for node in graph:
        before = {value.producer() for value in node.inputs if value is not None}
        if not before.isdisjoint(behind):
            behind.add(node)
        elif node in layers:
            first.add(node)
            behind.add(node)
    return first if first != layers else set()


def merge_groups(pairs: Iterable[Collection[str]]) -> tuple[frozenset[str], ...]:
    """Joins sets that overlap into disjoint groups."""
    groups: list[set[str]] = []
    for pair in pairs:
        joined = set(pair)
        for group in [g for g in groups if not joined.isdisjoint(g)]:
            joined |= group
            groups.remove(group)
        groups.append(joined)
    return tuple(frozenset(group) for group in groups if len(group) > 1)


def read(use: Use) -> ir.Value:
    """What a node reads there."""
    value = use.node.inputs[use.place] if use.node is not None else None
    if value is None:
        raise ValueError("an operand is left out, or the use is no node's")
    return value
