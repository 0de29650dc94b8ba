"""Finds attention: two products of activations with Softmax between them, q k^T - scale - mask - Softmax - p v.

torch lets ``Where(IsNaN(p), 0, p)`` follow Softmax, for rows whose keys are all masked by minus infinity. It would
stand between Softmax and QuantizeLinear, and TensorRT then makes three kernels of what may be a single 8-bit one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ..graph import Graph
from ..graph.editing import is_constant

_SCALING = frozenset(("Add", "Cast", "Div", "Mul", "Sub", "Where"))
_MOVING = frozenset(("Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))


class Attention(NamedTuple):
    """The nodes of one attention.

    Attributes:
        keys: how many keys there are; None where that varies.
        guarded: whether Where stands between Softmax and the product.
    """

    scores: ir.Node
    softmax: ir.Node
    mixed: ir.Node
    keys: int | None
    guarded: bool


def attentions(nodes: Iterable[ir.Node]) -> Iterator[Attention]:
    """The attentions among these nodes."""
    for node in nodes:
        if node.op_type != "Softmax" or node.domain:
            continue
        scores, mixed = _before(node.inputs[0]), _after(node.outputs[0])
        if scores is not None and mixed is not None:
            keys = node.outputs[0].shape[-1] if node.outputs[0].shape else None
            guarded = any(reader.op_type == "Where" for reader in node.outputs[0].consumers())
            yield Attention(scores, node, mixed, keys if isinstance(keys, int) else None, guarded)


def drop_guards(graph: Graph) -> int:
    """Removes guards behind Softmax where masks are finite, so that there is no NaN; returns how many."""
    main, dropped = graph.model.graph, 0
    for node in list(main):
        guard = node.inputs[0].producer() if node.op_type == "Where" and node.inputs[0] is not None else None
        if guard is None or guard.op_type != "IsNaN" or guard.inputs[0] is not node.inputs[2]:
            continue
        probabilities, result = guard.inputs[0], node.outputs[0]
        softmax = probabilities.producer() if probabilities is not None else None
        if probabilities is None or softmax is None or softmax.op_type != "Softmax" or result.is_graph_output():
            continue
        if not is_finite(softmax.inputs[0]):
            continue
        result.replace_all_uses_with(probabilities)
        main.remove(node, safe=True)
        if not guard.outputs[0].uses() and not guard.outputs[0].is_graph_output():
            main.remove(guard, safe=True)
        dropped += 1
    return dropped


def is_finite(value: ir.Value | None) -> bool:
    """Whether this is a product with nothing but finite constants and integers added to it, or multiplied."""
    pending, seen = [value], set[ir.Value]()
    while pending:
        current = pending.pop()
        if current is None or current in seen or current.dtype != ir.DataType.FLOAT:
            continue
        seen.add(current)
        producer = current.producer()
        if current.const_value is not None and producer is None and not current.is_graph_input():
            if not np.isfinite(current.const_value.numpy()).all():
                return False
        elif producer is None or producer.domain:
            return False
        elif producer.op_type in _MOVING:
            pending.append(producer.inputs[0])
        elif producer.op_type in _SCALING:
            pending.extend(producer.inputs)
        elif producer.op_type != "MatMul":
            return False
    return True


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
    return not any(is_constant(operand) for operand in node.inputs)
