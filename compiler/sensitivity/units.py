"""Cuts a graph into units: what is lowered, or stays, together.

Each heavy node (convolution, matrix product, recurrence) is a unit with the light nodes after it, as far as their
latest data comes from it; the light nodes before the first heavy node join that. Branches and bodies are cut likewise.
Where there would be more than `MOST` units, those between two places where a single tensor carries all data become one:
residual blocks, attention, feed-forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

import onnx_ir as ir

from ..graph import Graph
from ..graph.precision import HEAVY
from ..graph.selection import label
from ..graph.verifier import subgraphs

MOST = 48


@dataclasses.dataclass(frozen=True)
class Unit:
    """Labels of nodes in the graph's order; `heavy` are those whose precision decides the speed."""

    name: str
    nodes: tuple[str, ...]
    heavy: tuple[str, ...]


def split(graph: Graph, among: Collection[str], *, most: int = MOST) -> list[Unit]:
    """The units of a graph, in its order.

    Args:
        among: labels of the nodes that can be lowered; others belong to no unit.
        most: with more units than that, blocks are taken.
    """
    allowed = frozenset(among)
    scopes = [scope for scope in graph.graphs() if scope is graph.model.graph or any(map(_is_heavy, scope))]
    groups = [(scope, [group for group in _groups(scope) if _labels(group, allowed)]) for scope in scopes]
    if sum(len(found) for _, found in groups) > most:
        groups = [(scope, _merged(scope, found)) for scope, found in groups]
    return [_unit(group, allowed) for _, found in groups for group in found]


def _unit(group: list[ir.Node], allowed: frozenset[str]) -> Unit:
    labels = _labels(group, allowed)
    heavy = tuple(label(node) for node in group if _is_heavy(node) and label(node) in allowed)
    ends = (heavy or labels)[0], (heavy or labels)[-1]
    return Unit(ends[0] if ends[0] == ends[1] else " .. ".join(ends), labels, heavy)


def _labels(group: list[ir.Node], allowed: frozenset[str]) -> tuple[str, ...]:
    found = (label(inner) for node in group for inner in _taken_along(node))
    return tuple(dict.fromkeys(name for name in found if name in allowed))


def _is_heavy(node: ir.Node) -> bool:
    return node.op_type in HEAVY


def _taken_along(node: ir.Node) -> Iterator[ir.Node]:
    """A node, and those in its branches and bodies without heavy nodes, which are no units of their own."""
    yield node
    for graph in subgraphs(node):
        if not any(map(_is_heavy, graph)):
            for inner in graph:
                yield from _taken_along(inner)


def _with_inner(node: ir.Node) -> Iterator[ir.Node]:
    yield node
    for graph in subgraphs(node):
        for inner in graph:
            yield from _with_inner(inner)


def _groups(graph: ir.Graph) -> list[list[ir.Node]]:
    """One group a heavy node; the light nodes before all of them are in the first."""
    group_of: dict[ir.Node, int] = {}
    groups: list[list[ir.Node]] = []
    early: list[ir.Node] = []
    for node in graph:
        latest = max((group_of.get(producer, -1) for producer in _producers(node)), default=-1)
        if _is_heavy(node):
            latest = len(groups)
            groups.append([])
        if latest < 0:
            early.append(node)
            continue
        group_of[node] = latest
        groups[latest].append(node)
    if not groups:
        return [[node] for node in early]
    groups[0] = early + groups[0]
    return groups


def _merged(graph: ir.Graph, groups: list[list[ir.Node]]) -> list[list[ir.Node]]:
    """Joins the groups between places where a single tensor that depends on a heavy node is alive.

    Others are not counted: a mask goes to every attention.
    """
    order = {node: place for place, node in enumerate(graph)}
    owner = {inner: node for node in order for inner in _with_inner(node)}
    depends: set[ir.Node] = set()
    changes = [0] * (len(order) + 1)
    for node, place in order.items():
        if not (_is_heavy(node) or any(producer in depends for producer in _producers(node))):
            continue
        depends.add(node)
        for value in node.outputs:
            users = [order[owner[user]] for user in value.consumers()]
            last = len(order) - 1 if value.is_graph_output() else max(users, default=place)
            changes[place] += 1
            changes[last] -= 1
    cuts: list[int] = []
    alive = 0
    for place, change in enumerate(changes):
        alive += change
        if alive == 1:
            cuts.append(place)
    blocks: dict[int, list[ir.Node]] = {}
    for group in groups:
        first = order[next(filter(_is_heavy, group), group[0])]
        blocks.setdefault(sum(cut < first for cut in cuts), []).extend(group)
    return [sorted(block, key=order.__getitem__) for block in blocks.values()]


def _producers(node: ir.Node) -> Iterator[ir.Node]:
    for inner in _with_inner(node):
        for value in inner.inputs:
            if value is not None and (producer := value.producer()) is not None and producer.graph is node.graph:
                yield producer
