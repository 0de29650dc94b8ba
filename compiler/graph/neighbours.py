"""Ways from node to node along float32 tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import onnx_ir as ir

from .precision import is_float, keep

ROOTS = frozenset((
    "Clip", "Expand", "Identity", "Log", "Max", "Pow", "Reciprocal", "Reshape", "Sqrt", "Unsqueeze",
))  # fmt: skip
"""Operators between a variance and the division by its root."""


def keep_around(node: ir.Node, reason: str) -> None:
    """Keeps a node that guards a division, the sum of squares before it, and the root and the division after it."""
    keep(node, reason)
    for earlier in reach(node, before, lambda n: n.op_type.startswith("Reduce")):
        if earlier.op_type.startswith("Reduce") or earlier.op_type in ("Mul", "Pow"):
            keep(earlier, reason)
    for later in reach(node, after, lambda n: n.op_type in ROOTS):
        if later.op_type in ROOTS or later.op_type in ("Div", "Mul"):
            keep(later, reason)


def producers(value: ir.Value) -> list[ir.Node]:
    """The node that makes a value, if one does."""
    producer = value.producer()
    return [] if producer is None else [producer]


def before(node: ir.Node) -> list[ir.Node]:
    """The nodes that a node's float32 inputs come from."""
    return [producer for value in node.inputs if value is not None and is_float(value) for producer in producers(value)]


def after(node: ir.Node) -> list[ir.Node]:
    """The nodes that a node's float32 outputs go to."""
    return [consumer for value in node.outputs if is_float(value) for consumer in value.consumers()]


def neighbours(node: ir.Node) -> list[ir.Node]:
    """Both."""
    return [*before(node), *after(node)]


def reach(
    node: ir.Node, step: Callable[[ir.Node], Sequence[ir.Node]], onward: Callable[[ir.Node], bool]
) -> Iterable[ir.Node]:
    """All nodes that steps lead to from here, through nodes where `onward` holds."""
    pending, seen = list(step(node)), set[ir.Node]()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if onward(current):
            pending.extend(step(current))
    return seen
