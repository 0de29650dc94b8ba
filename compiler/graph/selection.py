"""Nodes chosen by name or by glob."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable

import onnx_ir as ir

from ...errors import RecipeError
from .graph import Graph


def label(node: ir.Node) -> str:
    """The name that a node goes by in options, refusals and reports: its own, else its first output's."""
    return node.name or (node.outputs[0].name if node.outputs else "") or node.op_type


def select(graph: Graph, patterns: Iterable[str]) -> dict[str, str]:
    """Labels of the nodes that match, each with the first pattern that it matches. A name matches itself.

    Raises:
        RecipeError: a pattern matches no node.
    """
    labels = list(dict.fromkeys(label(node) for node in graph.nodes() if node.op_type != "Constant"))
    found: dict[str, str] = {}
    for pattern in patterns:
        matching = [name for name in labels if name == pattern or fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            raise _no_match(pattern, labels)
        for name in matching:
            found.setdefault(name, pattern)
    return found


def _no_match(pattern: str, labels: list[str]) -> RecipeError:
    near = difflib.get_close_matches(pattern.strip("*"), labels, n=1)
    near += [name for name in labels if pattern.strip("*").lower() in name.lower()][:1]
    return RecipeError(
        f"no node matches {pattern!r}",
        expected="the name of a node, or a glob such as '*/attention/*'",
        found=f"{len(labels)} nodes, among them {', '.join(map(repr, labels[:3])) or 'none'}",
        hint=f"did you mean {near[0]!r}?" if near else None,
    )
