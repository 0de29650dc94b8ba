"""Sparse attention of prompts: every token sees what it would see alone, by a mask."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..graph.schemas import MICROSOFT
from .kinds import Blocks, Kind, TopK, Window
from .nodes import INTEGER, Nodes
from .operands import Operands, ranked


def attend(nodes: Nodes, given: Operands, kind: Kind) -> ir.Value:
    """The result (batch, time, heads * width)."""
    if isinstance(kind, Window):
        return _window(nodes, given, kind)
    layer = given.layer
    turned = nodes.transpose(nodes.reshape(given.query, 0, 0, layer.heads, layer.width), 0, 2, 1, 3)
    query = nodes.reshape(turned, 0, layer.shared, -1, layer.width)
    reach = nodes.integer("Cast", given.most, to=INTEGER.value)
    if isinstance(kind, Blocks):  # up to the end of the last block, which the cache holds whole
        above = nodes.integer("Add", reach, nodes.whole(kind.size - 1))
        number = nodes.integer("Div", above, nodes.whole(kind.size))
        reach = nodes.integer("Mul", number, nodes.whole(kind.size))
    end = nodes.reshape(reach, 1)
    keys, values = (nodes("Slice", cache, nodes.shape(0), end, nodes.shape(2)) for cache in (given.keys, given.values))
    slots, places = _positions(nodes, given, reach)
    causal = _closing(nodes, nodes.truth("LessOrEqual", slots, places))
    products = nodes("Mul", nodes("MatMul", query, nodes.transpose(keys, 0, 1, 3, 2)), nodes.number(layer.scale))
    masked = nodes("Add", nodes.reshape(products, 0, layer.heads, -1, 0), causal)
    masked = _top(nodes, kind, masked, end) if isinstance(kind, TopK) else _blocks(nodes, kind, masked, places, end)
    weights = nodes.reshape(nodes("Softmax", masked, axis=-1), 0, layer.shared, -1, 0)
    result = nodes.reshape(nodes("MatMul", weights, values), 0, layer.heads, -1, layer.width)
    return nodes.reshape(nodes.transpose(result, 0, 2, 1, 3), 0, 0, layer.heads * layer.width)


def _window(nodes: Nodes, given: Operands, kind: Window) -> ir.Value:
    """By the operator itself; the caches that it writes are copies, and left."""
    layer, dtype = given.layer, nodes.dtype
    inputs: list[ir.Value | None] = [given.query, given.key, given.value, given.keys, given.values]
    inputs += [given.last, given.most]
    attributes = {"num_heads": layer.heads, "kv_num_heads": layer.shared, "scale": layer.scale}
    if kind.sinks:
        inputs += [None, None, None, _bias(nodes, given, kind)]
    else:
        attributes["local_window_size"] = kind.width
    outputs = nodes.add("GroupQueryAttention", inputs, attributes, dtypes=(dtype, dtype, dtype), domain=MICROSOFT)
    return outputs[0]


def _bias(nodes: Nodes, given: Operands, kind: Window) -> ir.Value:
    """Minus infinity on what lies before the window and is no sink, (batch, 1, time, positions)."""
    reach = nodes.integer("Cast", given.most, to=INTEGER.value)
    slots, places = _positions(nodes, given, reach)
    near = nodes.truth("Greater", slots, nodes.integer("Sub", places, nodes.whole(kind.width)))
    return _closing(nodes, nodes.truth("Or", near, nodes.truth("Less", slots, nodes.whole(kind.sinks))))


def _positions(nodes: Nodes, given: Operands, reach: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Of the first `reach` keys (keys), and of the queries (batch, 1, time, 1)."""
    slots = nodes.integer("Range", nodes.whole(0), reach, nodes.whole(1))
    return slots, nodes.integer("Unsqueeze", given.positions, nodes.constants(np.array([1, 3])))


def _closing(nodes: Nodes, open_: ir.Value) -> ir.Value:
    """What is added to scores: zero where they are open, minus infinity elsewhere."""
    return nodes("Where", open_, nodes.number(0.0), nodes.number(float("-inf")))


def _top(nodes: Nodes, kind: TopK, masked: ir.Value, end: ir.Value) -> ir.Value:
    count = nodes.integer("Min", nodes.shape(kind.count), end)
    best, places = nodes.top(masked, count)
    closed = nodes("Expand", nodes.number(float("-inf")), nodes.integer("Shape", masked))
    return nodes("ScatterElements", closed, places, best, axis=-1)


def _blocks(nodes: Nodes, kind: Blocks, masked: ir.Value, places: ir.Value, end: ir.Value) -> ir.Value:
    blocks = nodes.reshape(masked, 0, 0, 0, -1, kind.size)
    number = nodes.integer("Div", end, nodes.whole(kind.size))
    numbers = nodes.integer("Range", nodes.whole(0), nodes.reshape(number), nodes.whole(1))
    order = ranked(nodes, blocks, numbers, nodes.integer("Div", places, nodes.whole(kind.size)))
    best, chosen = nodes.top(order, nodes.integer("Min", nodes.shape(kind.count + 1), number))
    closed = nodes("Expand", nodes.number(float("-inf")), nodes.integer("Shape", order))
    opened = nodes("Expand", nodes.number(0.0), nodes.integer("Shape", best))
    mask = nodes("ScatterElements", closed, chosen, opened, axis=-1)
    return nodes.reshape(nodes("Add", blocks, nodes("Unsqueeze", mask, nodes.shape(4))), 0, 0, 0, -1)
