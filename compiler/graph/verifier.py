"""The rules that a legal graph obeys, as two tables: `NODE_RULES` for each node, `GRAPH_RULES` for names and order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import onnx_ir as ir

from ...errors import GraphError
from .schemas import MICROSOFT, Schema, microsoft_schemas, schema, type_text

_VARIADIC_ARITY = 2**31 - 1


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs in a node's attributes: branches and loop bodies."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


@dataclasses.dataclass(frozen=True)
class Violation:
    """How a rule is broken."""

    detail: str
    expected: object = None
    found: object = None


@dataclasses.dataclass(frozen=True)
class Scope:
    """What the nodes of a graph may use.

    Attributes:
        opsets: versions imported by the model, or by the function that the graph belongs to.
        outer: values of the enclosing graphs.
    """

    opsets: Mapping[str, int]
    functions: Mapping[ir.OperatorIdentifier, ir.Function]
    outer: frozenset[ir.Value] = frozenset()

    def schema(self, node: ir.Node) -> Schema | None:
        """The node's schema; None for a function of the model and where schemas of its domain are not installed."""
        if node.op_identifier() in self.functions:
            return None
        return schema(node.domain, node.op_type, self.opsets.get(node.domain, 0))


def _opset_imported(node: ir.Node, scope: Scope) -> Violation | None:
    if node.domain in scope.opsets:
        return None
    return Violation(f"domain {node.domain!r} is not imported", ", ".join(map(repr, scope.opsets)), repr(node.domain))


def _operator_exists(node: ir.Node, scope: Scope) -> Violation | None:
    if scope.schema(node) or node.op_identifier() in scope.functions:
        return None
    if node.domain == MICROSOFT and not microsoft_schemas():
        return None
    version = scope.opsets[node.domain]
    name = f"{node.domain or 'ai.onnx'}::{node.op_type}"
    return Violation(f"operator {name} does not exist", f"an operator of opset {version}, or a function", name)


def _arity(node: ir.Node, scope: Scope) -> Violation | None:
    if (function := scope.functions.get(node.op_identifier())) is not None:
        if len(node.inputs) <= len(function.inputs) and len(node.outputs) <= len(function.outputs):
            return None
        expected = f"at most {len(function.inputs)} inputs and {len(function.outputs)} outputs"
        return Violation("wrong number of inputs or outputs", expected, f"{len(node.inputs)}, {len(node.outputs)}")
    if (legal := scope.schema(node)) is None:
        return None
    for kind, count, (low, high) in (
        ("inputs", len(node.inputs), legal.input_counts),
        ("outputs", len(node.outputs), legal.output_counts),
    ):
        if not low <= count <= high:
            expected = f"at least {low}" if high >= _VARIADIC_ARITY else f"{low} to {high}"
            return Violation(f"wrong number of {kind}", expected, count)
    for index, value in enumerate(node.inputs):
        if value is None and legal.parameter(index).required:
            return Violation(f"required input {legal.parameter(index).name!r} is left out")
    return None


def _attributes(node: ir.Node, scope: Scope) -> Violation | None:
    if (legal := scope.schema(node)) is None:
        return None
    for name in node.attributes:
        if name not in legal.attributes:
            return Violation(f"attribute {name!r} does not exist", ", ".join(legal.attributes) or "none", name)
    for name, required in legal.attributes.items():
        if required and name not in node.attributes:
            return Violation(f"attribute {name!r} is missing")
    return None


def _types(node: ir.Node, scope: Scope) -> Violation | None:
    if (legal := scope.schema(node)) is None:
        return None
    bound: dict[str, str] = {}
    for output, values in ((False, node.inputs), (True, node.outputs)):
        for index, value in enumerate(values):
            if value is None or (text := type_text(value.type)) is None:
                continue
            parameter = legal.parameter(index, output=output)
            if not legal.allows(parameter, text):
                allowed = ", ".join(sorted(legal.types.get(parameter.type, (parameter.type,))))
                return Violation(f"type of {value.name!r} ({parameter.name})", allowed, text)
            if not (parameter.homogeneous and parameter.type in legal.types):
                continue
            if bound.setdefault(parameter.type, text) != text:
                return Violation(f"type of {value.name!r} ({parameter.name})", bound[parameter.type], text)
    return None


NODE_RULES: Mapping[str, Callable[[ir.Node, Scope], Violation | None]] = {
    "the opset of the node's domain is imported": _opset_imported,
    "the operator exists": _operator_exists,
    "inputs and outputs are as many as the operator has": _arity,
    "attributes are those of the operator": _attributes,
    "types satisfy the operator's constraints": _types,
}


def _names_are_unique(graph: ir.Graph, scope: Scope) -> Violation | None:
    owners: dict[str | None, ir.Value] = {value.name: value for value in scope.outer}
    outputs = [value for node in graph for value in node.outputs]
    for value in (*graph.inputs, *graph.initializers.values(), *outputs):
        if value.name == "" and value in outputs:
            continue  # an optional output that is left out
        if not value.name:
            return Violation(f"a value {_origin(value)} has no name")
        if value.is_initializer() and value.is_graph_input():
            owners.setdefault(value.name, value)
        if owners.setdefault(value.name, value) is not value or graph.inputs.count(value) > 1:
            return Violation(
                f"tensor {value.name!r} is defined twice, {_origin(owners[value.name])} and {_origin(value)}"
            )
    return None


def _inputs_are_defined(graph: ir.Graph, scope: Scope) -> Violation | None:
    known = {*scope.outer, *graph.inputs, *graph.initializers.values()}
    for node in graph:
        for value in node.inputs:
            if value is None or value in known:
                continue
            if value.producer() is None or value.producer() not in graph:
                return Violation(f"input {value.name!r} of {_title(node)} is not defined anywhere")
            if cycle := _cycle(node, value):
                return Violation(f"a cycle through {_title(node)} and tensor {value.name!r}", "no cycle", cycle)
            return Violation(f"input {value.name!r} of {_title(node)} is used before it is defined")
        known.update(node.outputs)
    return None


def _outputs_are_produced(graph: ir.Graph, scope: Scope) -> Violation | None:
    known = {*scope.outer, *graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)}
    for value in graph.outputs:
        if value not in known:
            return Violation(f"output {value.name!r} is not produced")
    return None


GRAPH_RULES: Mapping[str, Callable[[ir.Graph, Scope], Violation | None]] = {
    "each tensor has one name, and no other has it": _names_are_unique,
    "each input is defined before it is used": _inputs_are_defined,
    "each output is produced": _outputs_are_produced,
}


def verify(model: ir.Model) -> None:
    """Checks every graph, subgraph and function of a model.

    Raises:
        GraphError: the first rule that is broken.
    """
    functions = dict(model.functions)
    _verify_graph(model.graph, Scope(model.opset_imports, functions))
    for function in functions.values():
        _verify_graph(function.graph, Scope(function.opset_imports, functions))


def _verify_graph(graph: ir.Graph, scope: Scope) -> None:
    place = f"graph {graph.name!r}"
    for rule, check in GRAPH_RULES.items():
        _raise(place, rule, check(graph, scope))
    visible = scope.outer.union(graph.inputs, graph.initializers.values())
    outputs: set[ir.Value] = set()
    for node in graph:
        for rule, legal in NODE_RULES.items():
            _raise(_title(node), rule, legal(node, scope))
        for inner in subgraphs(node):
            _verify_graph(inner, dataclasses.replace(scope, outer=visible.union(outputs)))
        outputs.update(node.outputs)


def _raise(place: str, rule: str, violation: Violation | None) -> None:
    if violation is None:
        return
    raise GraphError(
        f"{place}: {violation.detail}",
        expected=violation.expected if violation.expected is not None else rule,
        found=violation.found,
        hint="export the model again, or report the pass that made this graph",
    )


def _cycle(node: ir.Node, value: ir.Value) -> str:
    """The names of the nodes from `node` back to itself through `value`; empty where no such path exists."""
    start = value.producer()
    paths: list[tuple[ir.Node, tuple[ir.Node, ...]]] = [(start, (start,))] if start is not None else []
    seen: set[ir.Node] = set()
    while paths:
        current, path = paths.pop()
        if current is node:
            return " -> ".join(_title(n) for n in (*reversed(path), node))
        if current in seen:
            continue
        seen.add(current)
        producers = [used.producer() for used in _used(current)]
        paths.extend((producer, (*path, producer)) for producer in producers if producer is not None)
    return ""


def _used(node: ir.Node) -> Iterator[ir.Value]:
    yield from (value for value in node.inputs if value is not None)
    for graph in subgraphs(node):
        for inner in graph:
            yield from _used(inner)


def _title(node: ir.Node) -> str:
    name = node.name or (node.outputs[0].name if node.outputs else "")
    return f"node {name!r} ({node.op_type})"


def _origin(value: ir.Value) -> str:
    if (producer := value.producer()) is not None:
        return f"by {_title(producer)}"
    return "as an input" if value.is_graph_input() else "as an initializer"
