"""Finds attention: two products of activations with Softmax between them.

q, k ─ MatMul ─ scale, mask ─ Softmax ─ MatMul ─ v
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import onnx_ir as ir

from .plan import constant

_SCALING = frozenset(("Add", "Cast", "Div", "Mul", "Sub", "Where"))
_MOVING = frozenset(("Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))


class Attention(NamedTuple):
    """The nodes of one attention; `keys` is how many keys there are, None where that varies."""

    scores: ir.Node
    softmax: ir.Node
    mixed: ir.Node
    keys: int | None


def attentions(nodes: Iterable[ir.Node]) -> Iterator[Attention]:
    """The attentions among these nodes."""
    for node in nodes:
        if node.op_type != "Softmax" or node.domain:
            continue
        scores, mixed = _before(node.inputs[0]), _after(node.outputs[0])
        if scores is not None and mixed is not None:
            keys = node.outputs[0].shape[-1] if node.outputs[0].shape else None
            yield Attention(scores, node, mixed, keys if isinstance(keys, int) else None)


def _before(value: ir.Value | None) -> ir.Node | None:
    """The product whose scaled and masked result this is."""
    pending = [value]
    while pending:
        current = pending.pop()
        producer = current.producer() if current is not None else None
        if producer is None or producer.domain:
            continue
        if producer.op_type == "MatMul":
            return producer if _is_of_activations(producer) else None
        if producer.op_type in _SCALING | _MOVING:
            pending.extend(producer.inputs)
    return None


def _after(value: ir.Value) -> ir.Node | None:
    """The product that alone reads this, past ``Where(IsNaN(x), 0, x)``, by which torch guards rows without any key."""
    while not value.is_graph_output():
        readers = [node for node in value.consumers() if node.op_type != "IsNaN"]
        if len(readers) != 1:
            return None
        (node,) = readers
        if node.op_type == "MatMul":
            return node if _is_of_activations(node) else None
        if node.op_type not in _MOVING | {"Cast", "Where"}:
            return None
        value = node.outputs[0]
    return None


def _is_of_activations(node: ir.Node) -> bool:
    return not any(constant(operand) for operand in node.inputs)
