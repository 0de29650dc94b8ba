"""Merges what a graph holds or computes twice.

    a = W, b = W                  ->  a, used twice        equal initializers (dtype, shape and values)
    y = f(x), z = f(x)            ->  y, used twice        equal operator, inputs and attributes

An enclosing graph's initializers and earlier results serve its subgraphs too. Random operators, Dropout, operators of
unknown domains and nodes with subgraphs are never merged.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Mapping
from typing import ClassVar

import onnx_ir as ir

from ..compiler.graph import Graph
from ..compiler.graph.identity import attribute_digest, tensor_digest
from ..compiler.graph.verifier import subgraphs
from .base import Context, Pass, PassResult, Refusal

RANDOM = frozenset(
    ("Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
)
_PURE_DOMAINS = frozenset(("", "ai.onnx.ml"))


@dataclasses.dataclass(frozen=True)
class Dedupe(Pass):
    """Merges equal initializers and common subexpressions in main graph, subgraphs and functions."""

    name: ClassVar[str] = "dedupe"

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Merges in place; graph inputs and outputs keep their names."""
        run = _Run(graph.model)
        run.visit(graph.model.graph, {}, {})
        for function in graph.model.functions.values():
            run.visit(function.graph, {}, {})
        return PassResult(bool(run.changes), dict(run.changes), tuple(run.refusals))


class _Run:
    def __init__(self, model: ir.Model) -> None:
        self.changes: collections.Counter[str] = collections.Counter()
        self.refusals: list[Refusal] = []
        self._pure_functions = {key for key, function in model.functions.items() if _is_pure(model, function)}

    def visit(self, graph: ir.Graph, tensors: Mapping[str, ir.Value], results: Mapping[Hashable, ir.Node]) -> None:
        """Merges in a graph that sees `tensors`, by digest, and `results` of the graphs around it."""
        tensors, results = dict(tensors), dict(results)
        for value in list(graph.initializers.values()):
            self._merge_initializer(graph, value, tensors)
        for node in list(graph):
            for inner in subgraphs(node):
                self.visit(inner, tensors, results)
            if (key := self._key(node)) is None:
                continue
            kept = results.setdefault(key, node)
            if kept is not node and not self._merge_node(graph, node, kept):
                reason = f"{node.outputs[0].name!r} equals {kept.outputs[0].name!r}, but both are outputs"
                self.refusals.append(Refusal(reason, node.name or node.outputs[0].name or ""))

    def _merge_initializer(self, graph: ir.Graph, value: ir.Value, tensors: dict[str, ir.Value]) -> None:
        if value.const_value is None or value.is_graph_input():
            return  # an input's default value: the caller may give another
        kept = tensors.setdefault(tensor_digest(value.const_value), value)
        if kept is value or value.is_graph_output():
            return
        value.replace_all_uses_with(kept)
        graph.initializers.pop(value.name or "")
        self.changes["initializers merged"] += 1
        self.changes["bytes saved"] += value.const_value.nbytes

    def _merge_node(self, graph: ir.Graph, node: ir.Node, kept: ir.Node) -> bool:
        """Lets `kept` serve in place of `node`; False where an output's name stands against it."""
        pairs = list(zip(node.outputs, kept.outputs, strict=True))
        outputs = [(value, other) for value, other in pairs if value.is_graph_output()]
        if any(kept.graph is not graph or other.is_graph_output() for _, other in outputs):
            return False
        for value, other in pairs:
            other.shape = other.shape if other.shape is not None else value.shape
            other.type = other.type if other.type is not None else value.type
            value.replace_all_uses_with(other, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        for value, other in outputs:
            other.name = value.name
        self.changes["nodes merged"] += 1
        return True

    def _key(self, node: ir.Node) -> Hashable | None:
        """What makes two nodes equal; None for a node that equals no other."""
        if node.op_identifier() not in self._pure_functions and not _is_pure_node(node):
            return None
        attributes = tuple((key, attribute_digest(value)) for key, value in sorted(node.attributes.items()))
        left_out = tuple(value.name == "" for value in node.outputs)
        return node.op_identifier(), tuple(node.inputs), attributes, left_out


def _is_pure(model: ir.Model, function: ir.Function) -> bool:
    """Whether a function, and all that it calls, gives equal results for equal inputs."""
    for node in function.all_nodes():
        called = model.functions.get(node.op_identifier())
        if not (_is_pure(model, called) if called is not None else _is_pure_node(node) or any(subgraphs(node))):
            return False
    return True


def _is_pure_node(node: ir.Node) -> bool:
    return node.domain in _PURE_DOMAINS and node.op_type not in RANDOM and not any(subgraphs(node))
