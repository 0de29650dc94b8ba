"""Undoes a detour of torch.export: `rsqrt` is written as two nodes, and runtimes know RMS normalization as a quotient.

x * Reciprocal(Sqrt(y))   ->   x / Sqrt(y)
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def divide_by_roots(model: ir.Model) -> int:
    """Makes quotients of such products; returns how many there were."""
    count = 0
    for node in list(model.graph):
        place = next((place for place in (0, 1) if _root(node, place) is not None), None)
        if place is None:
            continue
        quotient = ir.node("Div", [node.inputs[1 - place], _root(node, place)], name=node.name)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [quotient], node.outputs, quotient.outputs)
        count += 1
    if count:
        RemoveUnusedNodesPass()(model)
    return count


def _root(node: ir.Node, place: int) -> ir.Value | None:
    """The square root by whose reciprocal a node multiplies its other input."""
    if node.op_type != "Mul" or node.domain:
        return None
    factor = node.inputs[place]
    reciprocal = None if factor is None else factor.producer()
    if reciprocal is None or reciprocal.op_type != "Reciprocal" or reciprocal.inputs[0] is None:
        return None
    root = reciprocal.inputs[0]
    made = root.producer()
    return root if made is not None and made.op_type == "Sqrt" else None
