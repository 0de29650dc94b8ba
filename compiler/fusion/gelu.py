"""Finds GELU as exporters write it.

    x / 2 * (1 + erf(x / sqrt(2)))                             exact
    x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))   by tanh
    x * sigmoid(a * x)                                         by a sigmoid: a = 1.702, or 1 for SiLU

The factors may come in any order, and constants on either side.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import onnx_ir as ir

from .patterns import is_near, pairs, producer, product, reader, scalar, scaled

Form = Literal["exact", "tanh", "sigmoid"]

_CUBIC = 0.044715


class Gelu(NamedTuple):
    """A GELU from x to the value that it gives.

    Attributes:
        node: the one that tells the form, which is all of it where it is ONNX's Gelu.
        alpha: the factor within the sigmoid.
    """

    form: Form
    x: ir.Value
    result: ir.Value
    node: ir.Node
    alpha: float = 1.0


def gelu(node: ir.Node) -> Gelu | None:
    """The GELU that an Erf, Tanh or Sigmoid belongs to, or that is one node of ONNX's own; None where there is none."""
    if node.domain or node.op_type not in ("Erf", "Gelu", "Sigmoid", "Tanh") or node.inputs[0] is None:
        return None
    if node.op_type == "Gelu":
        by_tanh = node.attributes.get_string("approximate", "none") == "tanh"
        return Gelu("tanh" if by_tanh else "exact", node.inputs[0], node.outputs[0], node)
    if node.op_type == "Sigmoid":
        return _by_sigmoid(node)
    x, factor = scaled(node.inputs[0])
    if node.op_type == "Tanh":
        x = _argument(node.inputs[0])
    elif not is_near(factor, math.sqrt(0.5)):
        return None
    result = _halved(node.outputs[0], x) if x is not None else None
    return Gelu("tanh" if node.op_type == "Tanh" else "exact", x, result, node) if x and result else None


def _by_sigmoid(node: ir.Node) -> Gelu | None:
    given = node.inputs[0]
    x, alpha = scaled(given)
    for source, factor in ((given, 1.0), (x, alpha)):
        if source is not None and (result := product(node.outputs[0], source, 1.0)) is not None:
            return Gelu("sigmoid", source, result, node, factor)
    return None


def _halved(value: ir.Value, x: ir.Value) -> ir.Value | None:
    """``x / 2 * (1 + value)``."""
    plus_one = reader(value)
    if plus_one is None or plus_one.domain or plus_one.op_type != "Add":
        return None
    if not any(is_near(scalar(b), 1.0) for a, b in pairs(plus_one) if a is value):
        return None
    return product(plus_one.outputs[0], x, 0.5)


def _argument(value: ir.Value | None) -> ir.Value | None:
    """The x of ``sqrt(2 / pi) * (x + 0.044715 * x**3)``, which may be written ``x * (1 + 0.044715 * x**2)``."""
    inner, factor = scaled(value)
    if (node := producer(inner, "Add")) is not None and is_near(factor, math.sqrt(2 / math.pi)):
        for x, cubic in pairs(node):
            cube, constant = scaled(cubic, x)
            if is_near(constant, _CUBIC) and _is_power(cube, x, 3):
                return x
    node = producer(inner, "Mul")
    for a, b in pairs(node):
        source, constant = scaled(a)
        for one, quadratic in pairs(producer(b, "Add")):
            square, coefficient = scaled(quadratic)
            whole = is_near(factor * constant, math.sqrt(2 / math.pi)) and is_near(scalar(one), 1.0)
            if source is not None and whole and is_near(coefficient, _CUBIC) and _is_power(square, source, 2):
                return source
    return None


def _is_power(value: ir.Value | None, x: ir.Value, exponent: int) -> bool:
    if (node := producer(value, "Pow")) is not None:
        return node.inputs[0] is x and is_near(scalar(node.inputs[1]), exponent)
    if exponent == 1:
        return value is x
    node = producer(value, "Mul")
    return any(a is x and _is_power(b, x, exponent - 1) for a, b in pairs(node))
