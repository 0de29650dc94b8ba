"""Removes a Reshape that undoes the one before it: heads that are split off only to be joined again."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..graph import Graph
from .patterns import producer


def drop_undone(graph: Graph) -> None:
    """Changes a flat graph in place; what is read instead of a joined tensor takes over its name."""
    for node in list(graph.model.graph):
        if node.op_type != "Reshape" or node.domain or (result := node.outputs[0]).is_graph_output():
            continue
        first = producer(node.inputs[0], "Reshape")
        before = first.inputs[0] if first is not None else None
        if before is not None and before.producer() is not None and _same(before.shape, result.shape):
            result.replace_all_uses_with(before)
            name, result.name = result.name, before.name
            before.name = name
    RemoveUnusedNodesPass()(graph.model)


def _same(a: ir.Shape | None, b: ir.Shape | None) -> bool:
    """Whether two shapes are known to be the same."""
    if a is None or b is None or len(a) != len(b):
        return False
    return all(x == y and (isinstance(x, int) or x.value is not None) for x, y in zip(a, b, strict=True))
