"""Attention over a cache as fuse-attention leaves it: nodes of com.microsoft's GroupQueryAttention."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from ..fusion.patterns import size
from ..graph import Graph
from ..graph.schemas import MICROSOFT
from ..graph.selection import label

WRITTEN = frozenset(("num_heads", "kv_num_heads", "scale", "do_rotary", "rotary_interleaved"))
"""Attributes that fuse-attention writes."""

BIAS = 10
"""The input `attention_bias`."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """An attention.

    Attributes:
        heads, shared: of queries, and of keys and values.
        width: of a head.
        length: tokens that the cache holds.
    """

    node: ir.Node
    heads: int
    shared: int
    width: int
    length: int
    scale: float

    @property
    def name(self) -> str:
        """The node's."""
        return label(self.node)


def layers(graph: Graph) -> list[Layer]:
    """All of a flat graph, in its order."""
    return [found for node in _attentions(graph) if (found := _layer(node)) is not None]


def others(graph: Graph) -> dict[str, str]:
    """Why attention over a cache is none of `layers`, by the names of the nodes."""
    return {label(node): _reason(node) for node in _attentions(graph) if _layer(node) is None}


def _attentions(graph: Graph) -> list[ir.Node]:
    return [node for node in graph.model.graph if node.op_type == "GroupQueryAttention" and node.domain == MICROSOFT]


def _reason(node: ir.Node) -> str:
    if len(node.inputs) > BIAS and node.inputs[BIAS] is not None:
        return "its scores have a bias, as ALiBi has, which sparse attention does not add"
    return "it is no attention over a cache as fuse-attention leaves it"


def _layer(node: ir.Node) -> Layer | None:
    if set(node.attributes) - WRITTEN:
        return None
    if len(node.inputs) not in (7, 9) or None in node.inputs[3:] or len(node.outputs) != 3:
        return None
    shared, length, width = (size(node.inputs[3], axis) for axis in (1, 2, 3))
    heads = node.attributes.get_int("num_heads", 0)
    if not shared or not length or not width or not heads:
        return None
    return Layer(node, heads, shared, width, length, node.attributes.get_float("scale", 0.0) or width**-0.5)
