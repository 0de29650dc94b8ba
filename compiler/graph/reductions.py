"""Nodes that sum or magnify: they stay in float32 whatever the data, for little, since all of them are light.

    Reduce(x * x), then + epsilon, root, division        squares leave the range, and the sum has few digits
    ReduceSum(Exp(x)), then division                     softmax in pieces
    Reduce over more than 2 ** bits numbers              a sum in the smaller type no longer grows by what is added
    Pow(x, p), |p| > 4 or not constant                   magnifies roundings p times

Softmax, LayerNormalization and the like as one node compute in float32 inside, and are lowered.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from .formats import Format
from .graph import Graph
from .neighbours import ROOTS, after, producers, reach
from .precision import is_float, keep

_LARGEST_EXPONENT = 4.0
_SQUARING = frozenset(("ReduceL2", "ReduceLogSumExp", "ReduceSumSquare"))
_SUMMING = frozenset((
    "CumSum", "GlobalAveragePool", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceSum",
    "ReduceSumSquare",
))  # fmt: skip


def keep_sums(graph: Graph, to: Format) -> None:
    """Marks the nodes that sum or magnify."""
    for node in graph.nodes():
        if node.domain:
            continue
        if node.op_type == "Pow" and (reason := _magnifies(node)):
            keep(node, reason)
        if node.op_type not in _SUMMING or not is_float(node.outputs[0]):
            continue
        source = node.inputs[0]
        made_by = producers(source) if source is not None else []
        if node.op_type in _SQUARING:
            _keep_chain(node, "sums squares or exponentials")
        elif any(map(_is_square, made_by)) or any(earlier.op_type == "Exp" for earlier in made_by):
            for earlier in made_by:
                keep(earlier, "is summed, and its range is wide")
            _keep_chain(node, "sums squares or exponentials")
        if (count := _summed(node)) > 2**to.bits:
            keep(node, f"sums {count} numbers, and {to.name} counts to {2**to.bits} only")


def _keep_chain(node: ir.Node, reason: str) -> None:
    """Keeps a sum, the epsilon and the root after it, and the division by that."""
    keep(node, reason)
    for later in reach(node, after, lambda n: n.op_type in ROOTS or _adds_constant(n)):
        if later.op_type in ROOTS or later.op_type in ("Div", "Mul") or _adds_constant(later):
            keep(later, reason)


def _is_square(node: ir.Node) -> bool:
    if node.op_type == "Mul":
        return node.inputs[0] is node.inputs[1]
    return node.op_type == "Pow" and _exponent(node) == 2


def _adds_constant(node: ir.Node) -> bool:
    return node.op_type == "Add" and any(_scalar(value) is not None for value in node.inputs)


def _magnifies(node: ir.Node) -> str | None:
    exponent = _exponent(node)
    if exponent is None:
        return "raises to a power that is not known"
    return f"raises to the power {exponent:g}" if abs(exponent) > _LARGEST_EXPONENT else None


def _exponent(node: ir.Node) -> float | None:
    return _scalar(node.inputs[1])


def _scalar(value: ir.Value | None) -> float | None:
    """The number that a constant of one element holds."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().item())


def _summed(node: ir.Node) -> int:
    """How many numbers go into one of the result, as far as shapes tell."""
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or result.shape is None:
        return 1
    if node.op_type == "CumSum":
        return max((axis for axis in source.shape if isinstance(axis, int)), default=1)
    sizes = [
        math.prod(axis for axis in value.shape if isinstance(axis, int)) for value in (source, result) if value.shape
    ]
    return sizes[0] // max(sizes[-1], 1) if len(sizes) == 2 else math.prod(sizes)
