"""Puts sparse attention in the place of a GroupQueryAttention.

    result, present k, v = GroupQueryAttention(q, new k, new v, past k, past v, last position, most positions)
    ->  present k, v = Scatter(past k, v; positions; new k, v)
        result = If(time = 1; of one token: what it sees is gathered; of prompts: with a mask)

Caches are written in place as before: nothing else reads a past.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ..fusion.unfolding import Unfolding
from ..graph import Graph
from ..quantization.patch import Patcher
from . import prompts, tokens
from .found import Layer, layers
from .kinds import Kind
from .nodes import INTEGER, Constants, Nodes
from .operands import Operands


def rewrite(graph: Graph, kinds: Mapping[str, Kind]) -> None:
    """Rewrites the layers of a flat graph that have a kind, by their names, in place."""
    writer = _Writer(graph)
    for layer in layers(graph):
        if layer.name in kinds:
            writer.replace(layer, kinds[layer.name])
    graph.model.graph.sort()
    graph.infer()


class _Writer:
    """What layers share is written once."""

    def __init__(self, graph: Graph) -> None:
        self._main = graph.model.graph
        patcher = Patcher(graph)
        self._constants = Constants(patcher)
        self._unfolding = Unfolding(patcher)
        self._known: dict[tuple[object, ...], tuple[ir.Value, ...]] = {}

    def replace(self, layer: Layer, kind: Kind) -> None:
        node = layer.node
        self._unfolding.apply(node)
        query, key, value, past_key, past_value, last, most = (given for given in node.inputs if given is not None)
        nodes = Nodes(self._constants, layer.name, query.dtype or ir.DataType.FLOAT)
        positions, ends, single = self._positions(nodes, query, last)
        caches = [_written(nodes, layer, positions, new, past) for new, past in ((key, past_key), (value, past_value))]
        given = Operands(layer, query, key, value, caches[0], caches[1], last, most, positions, ends)
        seen = self._seen(nodes, given, kind)
        one, many = (Nodes(self._constants, f"{layer.name}/{name}", nodes.dtype) for name in ("token", "prompt"))
        branches = {
            "then_branch": one.branch(f"{layer.name}/token", tokens.attend(one, given, kind, seen)),
            "else_branch": many.branch(f"{layer.name}/prompt", prompts.attend(many, given, kind)),
        }
        (result,) = nodes.add("If", [single], branches)
        result.shape = node.outputs[0].shape
        for new, old in zip(caches, node.outputs[1:], strict=True):
            new.shape = old.shape
        results = (result, *caches)
        ir.convenience.replace_nodes_and_values(self._main, node, [node], nodes.nodes, node.outputs, results)

    def _positions(self, nodes: Nodes, query: ir.Value, last: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Positions of the new tokens (batch, time), of the last (batch, 1), and whether there is one of each row."""
        key = ("positions", last)
        if key not in self._known:
            sizes = nodes.integer("Shape", query)
            time = nodes.integer("Gather", sizes, nodes.whole(1), axis=0)
            steps = nodes.integer("Range", nodes.integer("Sub", nodes.whole(1), time), nodes.whole(1), nodes.whole(1))
            ends = nodes.reshape(nodes.integer("Cast", last, to=INTEGER.value), -1, 1)
            single = nodes.truth("Equal", time, nodes.whole(1))
            self._known[key] = nodes.integer("Add", ends, steps), ends, single
        positions, ends, single = self._known[key]
        return positions, ends, single

    def _seen(self, nodes: Nodes, given: Operands, kind: Kind) -> tuple[ir.Value, ...]:
        key = (*tokens.shared(given, kind), nodes.dtype)
        if key not in self._known:
            self._known[key] = tokens.seen(nodes, given, kind)
        return self._known[key]


def _written(nodes: Nodes, layer: Layer, positions: ir.Value, new: ir.Value, past: ir.Value) -> ir.Value:
    """The cache (batch, heads, length, width) with new tokens (batch, time, heads * width) at their positions."""
    split = nodes.transpose(nodes.reshape(new, 0, 0, layer.shared, layer.width), 0, 2, 1, 3)
    places = nodes.integer("Unsqueeze", positions, nodes.constants(np.array([1, 3])))
    index = nodes.integer("Expand", places, nodes.integer("Shape", split))
    return nodes("ScatterElements", past, index, split, axis=2)
