"""Sums that a layer's result is a term of, as at the end of a residual branch."""

from __future__ import annotations

import onnx_ir as ir

from ..graph.editing import is_constant


def other_term(node: ir.Node) -> ir.Value | None:
    """The activation that is added to a layer's result, past its bias; None where none of the same shape is.

    Of two layers whose results are added, only the later one makes up for the earlier one's error.
    """
    value = node.outputs[0]
    for _ in range(2):
        uses = list(value.uses())
        if len(uses) != 1 or value.is_graph_output():
            return None
        user, place = uses[0]
        if user.op_type != "Add" or user.domain:
            return None
        other = user.inputs[1 - place]
        if other is None:
            return None
        if not is_constant(other):
            return other if _alike(other, value) and not _comes_after(other, node) else None
        value = user.outputs[0]
    return None


def _alike(first: ir.Value, second: ir.Value) -> bool:
    """Whether two activations are known to have one shape."""
    if first.shape is None or second.shape is None:
        return False
    return [str(size) for size in first.shape] == [str(size) for size in second.shape]


def _comes_after(value: ir.Value, node: ir.Node) -> bool:
    """Whether a value is made after a node, in the order of the graph."""
    producer = value.producer()
    if producer is None or producer.graph is None:
        return False
    for one in producer.graph:
        if one in (producer, node):
            return one is node
    return False
