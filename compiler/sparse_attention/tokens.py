"""Sparse attention of one token a row: what it sees is gathered from the caches, and nothing else goes on."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .kinds import Blocks, Kind, TopK, Window
from .nodes import Nodes
from .operands import Operands, ranked


def shared(given: Operands, kind: Kind) -> tuple[object, ...]:
    """What `seen` depends on."""
    who = (given.layer.shared,) if isinstance(kind, Window) else ()
    return (*who, kind if isinstance(kind, Window) else "all", given.ends, given.layer.length)


def seen(nodes: Nodes, given: Operands, kind: Kind) -> tuple[ir.Value, ...]:
    """What layers share: the mask (batch, 1, 1, keys), behind the places of the keys that a window holds."""
    if isinstance(kind, Window):
        return _window(nodes, given, kind)
    slots = nodes.constants(np.arange(given.layer.length))
    return (_mask(nodes, nodes.truth("LessOrEqual", slots, given.ends)),)


def attend(nodes: Nodes, given: Operands, kind: Kind, seen: tuple[ir.Value, ...]) -> ir.Value:
    """The result (batch, 1, heads * width) for what `seen` gives."""
    layer = given.layer
    if isinstance(kind, Window):
        places, mask = seen
        keys, values = (_rows(nodes, cache, places) for cache in (given.keys, given.values))
        weights = nodes("Softmax", nodes("Add", _scores(nodes, given, keys), mask), axis=-1)
        result = nodes("MatMul", nodes.reshape(weights, 0, layer.shared, -1, kind.sees), values)
        return nodes.reshape(result, 0, 1, -1)
    (mask,) = seen
    masked = nodes("Add", _scores(nodes, given, given.keys), mask)
    attended = _top(nodes, given, kind, masked) if isinstance(kind, TopK) else _blocks(nodes, given, kind, masked)
    return nodes.reshape(nodes("MatMul", *attended), 0, 1, -1)


def _scores(nodes: Nodes, given: Operands, keys: ir.Value) -> ir.Value:
    """Scaled products (batch, heads, 1, keys) of the query with keys (batch, shared, keys, width).

    Keys stand on the left, where a product of matrices reads them as they are: those on the right it copies.
    """
    layer, queries = given.layer, given.layer.heads // given.layer.shared
    if queries == 1:  # a vector, nothing transposed and no factor beside it: either would be fused to a slower product
        product = nodes("MatMul", keys, nodes.reshape(given.query, 0, layer.shared, layer.width, 1))
    else:
        query = nodes.reshape(given.query, 0, layer.shared, queries, layer.width)
        product = nodes("MatMul", keys, nodes.transpose(query, 0, 1, 3, 2))
        product = nodes.transpose(product, 0, 1, 3, 2)
    return nodes("Mul", nodes.reshape(product, 0, layer.heads, 1, -1), nodes.number(layer.scale))


def _window(nodes: Nodes, given: Operands, kind: Window) -> tuple[ir.Value, ...]:
    sinks = np.arange(kind.sees) < kind.sinks
    numbers = np.where(sinks, np.arange(kind.sees), np.arange(kind.sees) - kind.sees + 1)
    slots = nodes.integer("Add", given.ends, nodes.constants(np.where(sinks, 0, numbers)))
    slots = nodes.integer("Where", nodes.constants(sinks), nodes.constants(numbers), slots)
    early = nodes.truth("GreaterOrEqual", slots, nodes.constants(np.where(sinks, 0, kind.sinks)))
    open_ = nodes.truth("And", early, nodes.truth("LessOrEqual", slots, given.ends))
    places = nodes.integer("Where", open_, slots, nodes.whole(0))
    rows = nodes.integer("Shape", given.keys)
    rows = nodes.integer("Slice", rows, nodes.shape(0), nodes.shape(2))
    wide = nodes.integer("Concat", rows, nodes.shape(kind.sees, 1), axis=0)
    return nodes.integer("Expand", nodes.reshape(places, -1, 1, kind.sees, 1), wide), _mask(nodes, open_)


def _mask(nodes: Nodes, open_: ir.Value) -> ir.Value:
    """Zero where a token (batch, keys) sees, else minus infinity; (batch, 1, 1, keys)."""
    mask = nodes("Where", open_, nodes.number(0.0), nodes.number(float("-inf")))
    return nodes("Unsqueeze", mask, nodes.constants(np.array([1, 2])))


def _rows(nodes: Nodes, cache: ir.Value, places: ir.Value) -> ir.Value:
    """Rows of a cache (batch, shared, rows, width) at places (batch, shared, keys, 1)."""
    return nodes("GatherND", cache, places, batch_dims=2)


def _top(nodes: Nodes, given: Operands, kind: TopK, masked: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Weights (batch, heads, 1, count) and values (batch, heads, count, width)."""
    layer = given.layer
    best, places = nodes.top(masked, nodes.shape(kind.count))
    values = _rows(nodes, given.values, nodes.reshape(places, 0, layer.shared, -1, 1))
    return nodes("Softmax", best, axis=-1), nodes.reshape(values, 0, layer.heads, -1, layer.width)


def _blocks(nodes: Nodes, given: Operands, kind: Blocks, masked: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Weights (batch, heads, 1, keys) and values (batch, heads, keys, width) of whole blocks."""
    layer, count = given.layer, given.layer.length // kind.size
    blocks = nodes.reshape(masked, 0, layer.heads, count, kind.size)
    own = nodes.integer("Unsqueeze", nodes.integer("Div", given.ends, nodes.whole(kind.size)), nodes.shape(1))
    order = ranked(nodes, blocks, nodes.constants(np.arange(count)), own)
    _, places = nodes.top(order, nodes.shape(kind.count + 1))
    chosen = _rows(nodes, blocks, nodes.integer("Unsqueeze", places, nodes.shape(3)))
    cache = nodes.reshape(given.values, 0, layer.shared, count, kind.size * layer.width)
    values = _rows(nodes, cache, nodes.reshape(places, 0, layer.shared, -1, 1))
    weights = nodes("Softmax", nodes.reshape(chosen, 0, layer.heads, 1, -1), axis=-1)
    return weights, nodes.reshape(values, 0, layer.heads, -1, layer.width)
