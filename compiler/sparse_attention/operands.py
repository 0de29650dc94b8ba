"""What both branches read."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from .found import Layer
from .nodes import Nodes


@dataclasses.dataclass(frozen=True)
class Operands:
    """Of a layer.

    Attributes:
        query, key, value: of the new tokens, (batch, time, heads * width).
        keys, values: the caches with them, (batch, shared, length, width).
        last, most: the last position of each row, and how many positions the longest row has; 32 bits.
        positions, ends: of the new tokens, (batch, time), and of the last of them, (batch, 1).
    """

    layer: Layer
    query: ir.Value
    key: ir.Value
    value: ir.Value
    keys: ir.Value
    values: ir.Value
    last: ir.Value
    most: ir.Value
    positions: ir.Value
    ends: ir.Value


def ranked(nodes: Nodes, blocks: ir.Value, numbers: ir.Value, own: ir.Value) -> ir.Value:
    """How much a block of scores (..., blocks, size) counts: its own the most, then those of the largest mean.

    Args:
        numbers: of the blocks.
        own: the number of a token's own block.
    """
    sums = nodes("ReduceSum", blocks, nodes.shape(-1), keepdims=0)
    return nodes("Where", nodes.truth("Equal", numbers, own), nodes.number(float("inf")), sums)
