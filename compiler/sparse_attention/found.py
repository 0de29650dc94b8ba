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
    return [found for node in graph.model.graph if (found := _layer(node)) is not None]


def _layer(node: ir.Node) -> Layer | None:
    if node.op_type != "GroupQueryAttention" or node.domain != MICROSOFT or set(node.attributes) - WRITTEN:
        return None
    if len(node.inputs) not in (7, 9) or None in node.inputs[3:] or len(node.outputs) != 3:
        return None
    shared, length, width = (size(node.inputs[3], axis) for axis in (1, 2, 3))
    heads = node.attributes.get_int("num_heads", 0)
    if not shared or not length or not width or not heads:
        return None
    return Layer(node, heads, shared, width, length, node.attributes.get_float("scale", 0.0) or width**-0.5)
