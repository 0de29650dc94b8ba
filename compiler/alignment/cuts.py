"""Where what grew is cut off again: at outputs of the graph, and before nodes at its end that look at all positions.

    logits -> Softmax -> output         logits, grown -> Slice -> Softmax -> output
    logits -> ArgMax -> output          logits, grown -> Slice -> ArgMax -> output
    logits -> output                    logits, grown -> Slice -> output

Nothing behind such a node may be a product: between products no Slice is worth it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from ..dimensions import Dim, Dimensions, Group
from ..dimensions.layout import resolved
from ..graph import Graph
from ..graph.editing import Names, add_initializer, is_constant
from ..graph.selection import label
from ..graph.verifier import subgraphs
from .plan import blocks, is_made
from .share import PRODUCTS

_PRODUCTS = frozenset((*PRODUCTS, "Einsum", "QLinearConv", "QLinearMatMul"))

Edge = tuple[ir.Node, int]


class Cuts:
    """Edges before nodes at the end of a graph, open while dimensions are looked at: both sides go their own way."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._names = Names(graph)
        self._open: dict[ir.Value, ir.Value] = {}
        self._added: list[ir.Value] = []

    def open(self, dimensions: Dimensions, groups: Iterable[Group]) -> bool:
        """Opens the edges that free groups from what holds them. Returns whether there are any."""
        edges = [edge for group in groups for edge in self._edges(dimensions, group)]
        main = self._graph.model.graph
        for node, index in dict.fromkeys(edges):
            value = node.inputs[index]
            assert value is not None
            if value not in self._open:
                other = ir.Value(name=self._names.free(f"{value.name}/cut"), type=value.type, shape=value.shape)
                main.inputs.append(other)
                self._open[value] = other
                if not value.is_graph_output():
                    main.outputs.append(value)
                    self._added.append(value)
            node.replace_input_with(index, self._open[value])
        return bool(edges)

    def close(self, dimensions: Dimensions, growing: Iterable[Dim]) -> tuple[int, int]:
        """Joins the edges, and puts a Slice where a dimension grows. Returns how many at outputs, and before nodes."""
        main, growing = self._graph.model.graph, set(growing)
        for value in self._added:
            main.outputs.remove(value)
        outputs = {value: place for place, value in enumerate(main.outputs)}
        counts = [0, 0]
        for value in dict.fromkeys((*outputs, *self._open)):
            axes = dimensions.relations.of(value) or []
            grown = {
                axis: term.size for axis, term in enumerate(axes) if term is not None and resolved(term) in growing
            }
            kept = self._slice(value, grown, at_output=value in outputs) if grown else value
            if kept is not value:
                counts[value not in outputs] += 1
            if value in outputs:
                main.outputs[outputs[value]] = kept
            if value in self._open:
                other = self._open[value]
                for user, index in tuple(other.uses()):
                    user.replace_input_with(index, kept)
                main.inputs.remove(other)
        return counts[0], counts[1]

    def _edges(self, dimensions: Dimensions, group: Group) -> list[Edge]:
        """Where to cut; nothing where what holds the group is not all at the end of the graph."""
        found: list[Edge] = []
        by_label = {label(node): node for node in self._graph.model.graph}
        for hold in group.holds:
            if not blocks(hold):
                continue
            node = by_label.get(hold.where)
            edges = _edges_into(dimensions, node, group.dim) if node is not None and _is_last(node) else []
            if not edges:
                return []
            found.extend(edges)
        return found if is_made(group) else []

    def _slice(self, value: ir.Value, sizes: Mapping[int, int], *, at_output: bool) -> ir.Value:
        """The first positions of some axes; it takes over the name of an output."""
        name, producer = value.name or "", value.producer()
        assert producer is not None
        axes, ends = list(sizes), list(sizes.values())
        made = ir.Value(name=self._names.free(f"{name}/kept"), type=value.type, shape=value.shape)
        numbers = {"starts": [0] * len(axes), "ends": ends, "axes": axes}
        if self._graph.opset < 10:
            node = ir.node("Slice", [value], attributes=numbers, outputs=[made])
        else:
            inputs = [
                add_initializer(self._graph, self._names.free(f"{name}/{what}"), np.array(given, dtype=np.int64))
                for what, given in numbers.items()
            ]
            node = ir.node("Slice", [value, *inputs], outputs=[made])
        node.name = f"{label(producer)}/Slice"
        if at_output:
            producer.name = label(producer)  # which may be the name that the value gives away
            value.name = self._names.free(f"{name}/aligned")
            made.name = name
        self._graph.model.graph.insert_after(producer, node)
        return made


def _edges_into(dimensions: Dimensions, node: ir.Node, dim: Dim) -> list[Edge]:
    """Inputs of a node whose axis is the dimension and nothing else."""
    found: list[Edge] = []
    for index, value in enumerate(node.inputs):
        if value is None or is_constant(value) or value.producer() is None:
            continue
        axes = dimensions.relations.of(value) or []
        if any(term is not None and resolved(term) is dim for term in axes):
            found.append((node, index))
    return found


def _is_last(node: ir.Node) -> bool:
    """Whether no product comes behind a node, and nothing that could hide one."""
    waiting, seen = [node], {node}
    while waiting:
        current = waiting.pop()
        if current.op_type in _PRODUCTS or current.domain or any(True for _ in subgraphs(current)):
            return False
        for output in current.outputs:
            for user, _ in output.uses():
                if user not in seen:
                    seen.add(user)
                    waiting.append(user)
    return True
