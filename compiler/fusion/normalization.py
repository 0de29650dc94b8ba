"""Finds LayerNormalization and RMSNorm that are written in primitives, and the sum before one.

d = x - mean(x);  y = d / sqrt(mean(d**2) + epsilon) * scale + bias      over the last axis
y = x / sqrt(mean(x**2) + epsilon) * scale                               RMSNorm, likewise
s = x + skip (+ bias);  y = LayerNormalization(s), RMSNorm(s)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import onnx_ir as ir

from ..graph.editing import is_constant
from .patterns import integers, is_last, is_near, pairs, producer, rank, reader, scalar, size


class Normalization(NamedTuple):
    """A normalization over the last axis, of that length.

    Attributes:
        scale, bias: None where nothing follows the division.
        node: the division.
    """

    x: ir.Value
    length: int
    scale: ir.Value | None
    bias: ir.Value | None
    epsilon: float
    result: ir.Value
    node: ir.Node


class Skip(NamedTuple):
    """A sum that is normalized.

    Attributes:
        operator: of com.microsoft, that does both.
        bias: constant of one axis that is added to x as well; None where there is none.
        total: the sum, where others read it too.
        weights: scale, and bias of a LayerNormalization.
        node: what the normalization goes by.
    """

    operator: str
    x: ir.Value
    skip: ir.Value
    bias: ir.Value | None
    total: ir.Value | None
    weights: tuple[ir.Value | None, ...]
    epsilon: float
    result: ir.Value
    node: ir.Node


def skip(node: ir.Node) -> Skip | None:
    """A LayerNormalization of the sum of two activations of three axes; None where the node is none."""
    if node.domain or node.op_type != "LayerNormalization" or len(node.outputs) > 1:
        return None
    total = node.inputs[0]
    if total is None or not is_last(node.attributes.get_int("axis", -1), total) or rank(node.inputs[1]) != 1:
        return None
    summed = _summed(total, [node])
    if summed is None:
        return None
    weights = (node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None)
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    return Skip("SkipLayerNormalization", *summed, weights, epsilon, node.outputs[0], node)


def rms_skip(node: ir.Node) -> Skip | None:
    """An RMSNorm in primitives, by its division, of the sum of two activations of three axes; None where it is none."""
    if node.domain or node.op_type not in ("Div", "Mul"):
        return None
    total, epsilon = _divided(node)
    if total is None or epsilon is None or (scaled := _constant_after(node.outputs[0], "Mul", total)) is None:
        return None
    squares = [reader for reader in total.consumers() if _is_square(reader.outputs[0], total)]
    summed = _summed(total, [node, *squares])
    if summed is None:
        return None
    result, scale = scaled
    return Skip("SkipSimplifiedLayerNormalization", *summed, (scale,), epsilon, result, node)


def normalization(node: ir.Node) -> Normalization | None:
    """The normalization in primitives whose division, or product with a reciprocal, this is."""
    if node.domain or node.op_type not in ("Div", "Mul"):
        return None
    centred, epsilon = _divided(node)
    subtraction = producer(centred, "Sub")
    if subtraction is None or epsilon is None:
        return None
    x, mean = subtraction.inputs
    length = size(x, -1)
    if x is None or length is None or _mean_of(mean) is not x:
        return None
    result, scale, bias = node.outputs[0], None, None
    if (found := _constant_after(result, "Mul", x)) is not None:
        result, scale = found
        if (found := _constant_after(result, "Add", x)) is not None:
            result, bias = found
    return Normalization(x, length, scale, bias, epsilon, result, node)


def _summed(
    total: ir.Value, readers: Sequence[ir.Node]
) -> tuple[ir.Value, ir.Value, ir.Value | None, ir.Value | None] | None:
    """Both addends, the bias of one, and the total where it is read by others than these; None where it is no sum."""
    add = producer(total, "Add")
    if add is None or any(map(is_constant, add.inputs)):
        return None
    x, other = add.inputs
    if x is None or other is None:
        return None
    if _is_broadcast(x, other):
        x, other = other, x
    if rank(x) != 3 or rank(other) not in (2, 3):
        return None
    whole = total if total.is_graph_output() or set(total.consumers()) - set(readers) else None
    for a, b in ((x, other), (other, x)):
        biased = producer(a, "Add") if reader(a) is add else None
        for value, bias in pairs(biased):
            if (
                is_constant(bias)
                and rank(bias) == 1
                and rank(value) == 3
                and not _is_broadcast(value, b)
                and rank(b) == 3
            ):
                return value, b, bias, whole
    return x, other, None, whole


def _is_broadcast(x: ir.Value, other: ir.Value) -> bool:
    """Whether x is repeated over an axis that the other has, as far as one can see."""
    return (rank(x) or 0) < (rank(other) or 0) or any(size(x, i) == 1 and size(other, i) != 1 for i in (-3, -2))


def _divided(node: ir.Node) -> tuple[ir.Value | None, float | None]:
    """The d and the epsilon of ``d / sqrt(mean(d**2) + epsilon)``."""
    operands = [(node.inputs[0], node.inputs[1])] if node.op_type == "Div" else list(pairs(node))
    for centred, divisor in operands:
        root = divisor
        if node.op_type == "Mul":  # by the reciprocal
            inverse = producer(divisor, "Reciprocal", "Div")
            if inverse is None or (inverse.op_type == "Div" and not is_near(scalar(inverse.inputs[0]), 1.0)):
                continue
            root = inverse.inputs[-1]
        square_root = producer(root, "Sqrt")
        variance = producer(square_root.inputs[0], "Add") if square_root is not None else None
        for mean, number in pairs(variance):
            epsilon = scalar(number)
            if epsilon is not None and centred is not None and _is_square(_mean_of(mean), centred):
                return centred, epsilon
    return None, None


def _mean_of(value: ir.Value | None) -> ir.Value | None:
    """What a mean over the last axis is taken of."""
    node = producer(value, "ReduceMean")
    if node is None or not node.attributes.get_int("keepdims", 1):
        return None
    given = node.attributes.get_ints("axes") or (integers(node.inputs[1]) if len(node.inputs) > 1 else None)
    axes = tuple(given or ())
    return node.inputs[0] if len(axes) == 1 and is_last(axes[0], node.inputs[0]) else None


def _is_square(value: ir.Value | None, x: ir.Value) -> bool:
    node = producer(value, "Pow", "Mul")
    if node is None or node.inputs[0] is not x:
        return False
    return node.inputs[1] is x if node.op_type == "Mul" else is_near(scalar(node.inputs[1]), 2.0)


def _constant_after(value: ir.Value, operator: str, x: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """What the one reader gives, and the constant, as long as the last axis, that it adds or multiplies with."""
    node = reader(value)
    if node is None or node.domain or node.op_type != operator:
        return None
    for a, constant in pairs(node):
        if a is value and is_constant(constant) and rank(constant) == 1 and size(constant, 0) == size(x, -1):
            return node.outputs[0], constant
    return None
