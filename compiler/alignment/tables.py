"""Tables that a lookup shares with the last layer: the layer gets a copy that may grow, since a lookup's rows may not.

A lookup counts a negative index from the end, which new rows would move.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from ..graph import Graph
from ..graph.editing import Names, add_initializer, is_constant


@dataclasses.dataclass(frozen=True)
class Tie:
    """One product that was given a copy of a table."""

    node: ir.Node
    index: int
    table: ir.Value
    copy: ir.Value


def untie(graph: Graph, multiple: int) -> list[Tie]:
    """Gives products copies of the tables that they share with lookups, where those have no aligned number of rows."""
    names, ties = Names(graph), []
    for value in list(graph.model.graph.initializers.values()):
        uses = list(value.uses())
        array = value.const_value
        if not is_constant(value) or array is None or len(array.shape) != 2 or array.shape.numpy()[0] % multiple == 0:
            continue
        readers = [(node, index) for node, index in uses if node.op_type == "Gemm" and not node.domain]
        if not readers or not any(node.op_type == "Gather" for node, _ in uses):
            continue
        copy = add_initializer(graph, names.free(f"{value.name}/copy"), array.numpy(), value.dtype)
        for node, index in readers:
            node.replace_input_with(index, copy)
            ties.append(Tie(node, index, value, copy))
    return ties


def tie_again(graph: Graph, ties: list[Tie]) -> int:
    """Takes copies back that did not grow. Returns how many are left."""
    left: set[ir.Value] = set()
    for tie in ties:
        if tie.copy.shape != tie.table.shape:
            left.add(tie.copy)
            continue
        tie.node.replace_input_with(tie.index, tie.table)
        if not tie.copy.uses():
            graph.model.graph.initializers.pop(tie.copy.name or "", None)
    return len(left)
