"""Follows lanes through a graph, node by node, and says which dimensions must not grow since sums would change."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from ..dimensions import Dim, Dimensions
from ..dimensions.layout import leaves
from ..dimensions.resize import new_number
from ..graph.editing import is_constant
from ..graph.selection import label
from . import rules
from .lanes import UNSAFE, Lane, Operand

_LARGEST = 1 << 16
"""Elements of a constant whose numbers are looked at."""


def unsafe(dimensions: Dimensions, growing: Collection[Dim]) -> dict[Dim, str]:
    """The dimensions that would change what the model computes were they to grow, each with the reason.

    Args:
        growing: dimensions whose new positions have weights that are 0. The others keep their sizes.
    """
    walk = _Walk(dimensions, growing)
    for node in dimensions.graph.model.graph:
        for dim in walk.touched(node):
            walk.visit(node, dim)
    return walk.refused


class _Walk:
    def __init__(self, dimensions: Dimensions, growing: Collection[Dim]) -> None:
        self._dimensions = dimensions
        self._growing = set(growing)
        self._lanes: dict[tuple[ir.Value, Dim], Lane] = {}
        self.refused: dict[Dim, str] = {}

    def touched(self, node: ir.Node) -> list[Dim]:
        """The growing dimensions among the axes of a node's inputs and outputs."""
        relations = self._dimensions.relations
        axes = [relations.input(node, index) or () for index in range(len(node.inputs))]
        axes += [relations.output(node, index) or () for index in range(len(node.outputs))]
        found = dict.fromkeys(dim for terms in axes for term in terms if term is not None for dim in leaves(term))
        return [dim for dim in found if dim in self._growing]

    def visit(self, node: ir.Node, dim: Dim) -> None:
        """Notes what the outputs of a node hold at new positions of a dimension."""
        operands = [self._operand(node, index, dim) for index in range(len(node.inputs))]
        made = rules.after(node, operands, rules.Place(self._dimensions, dim))
        if isinstance(made, str):
            self.refused.setdefault(dim, f"{made} ({label(node)})")
            made = UNSAFE
        for output in node.outputs:
            self._lanes[output, dim] = made

    def _operand(self, node: ir.Node, index: int, dim: Dim) -> Operand | None:
        value = node.inputs[index]
        if value is None:
            return None
        axes = self._dimensions.relations.input(node, index) or ()
        has_dim = any(dim in leaves(term) for term in axes if term is not None)
        if not is_constant(value):
            return Operand(self._lanes.get((value, dim), UNSAFE) if has_dim else None, None, value.dtype)
        if has_dim:
            return Operand(Lane(float(new_number(node, index))), None, value.dtype)
        tensor = value.const_value
        array = tensor.numpy() if tensor is not None and tensor.size <= _LARGEST else None
        return Operand(None, array, value.dtype)
