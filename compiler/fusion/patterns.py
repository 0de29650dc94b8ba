"""What the patterns share: reading a flat graph upward from a value, and products with several factors."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from ..graph.editing import is_constant


def producer(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """The node that makes a value, where it is one of these of ONNX's own domain."""
    node = value.producer() if value is not None else None
    return node if node is not None and not node.domain and node.op_type in operators else None


def scalar(value: ir.Value | None) -> float | None:
    """The number that a constant holds, where it is a single float."""
    if value is None or not is_constant(value) or value.const_value is None or value.const_value.size != 1:
        return None
    array = value.const_value.numpy()
    return float(array.reshape(())) if array.dtype.kind == "f" else None


def integers(value: ir.Value | None) -> tuple[int, ...] | None:
    """The numbers that a constant holds, where they are few integers: a shape, axes."""
    if value is None or not is_constant(value) or value.const_value is None or value.const_value.size > 16:
        return None
    array = value.const_value.numpy()
    return tuple(array.reshape(-1).tolist()) if array.dtype.kind in "iu" else None


def is_near(found: float | None, number: float) -> bool:
    """Whether a number was found and equals another as float16 would round it."""
    return found is not None and abs(found - number) <= 1e-3 * abs(number)


def pairs(node: ir.Node | None) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Both orders of the operands of a commutative node."""
    if node is not None and len(node.inputs) == 2:
        a, b = node.inputs
        if a is not None and b is not None:
            yield a, b
            yield b, a


def scaled(value: ir.Value | None, stop: ir.Value | None = None) -> tuple[ir.Value | None, float]:
    """A value, or `stop` on the way to it, without the constants that it is multiplied with, and their product."""
    factor = 1.0
    while value is not stop and (node := producer(value, "Mul", "Div")) is not None:
        a, b = node.inputs
        if (number := scalar(b)) is not None and number != 0:
            value, factor = a, factor / number if node.op_type == "Div" else factor * number
        elif node.op_type == "Mul" and (number := scalar(a)) is not None:
            value, factor = b, factor * number
        else:
            break
    return value, factor


def reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value, once and alone; None where there are others, or it is an output."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value, but for those that look at its shape."""
    readers = [node for node in value.consumers() if node.op_type != "Shape"]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() and not readers[0].domain else None


def product(start: ir.Value, x: ir.Value, coefficient: float) -> ir.Value | None:
    """The value ``coefficient * x * start``, where nothing but multiplications makes it and `start` is read alone."""
    result, found, times = start, 1.0, 0
    while times == 0 or not is_near(found, coefficient):
        node = reader(result)
        if node is None or node.domain or node.op_type not in ("Mul", "Div"):
            return None
        a, b = node.inputs
        other = b if a is result else a
        constant = scalar(other)
        rest, number = (None, constant) if constant is not None else scaled(other, x)
        if node.op_type == "Div":
            if constant is None or constant == 0 or other is not b:
                return None
            number = 1 / constant
        elif constant is None:
            if rest is not x or times:
                return None
            times = 1
        found *= number
        result = node.outputs[0]
    return result


def rank(value: ir.Value | None) -> int | None:
    """How many axes a value has; None where that is not known."""
    return len(value.shape) if value is not None and value.shape is not None else None


def size(value: ir.Value | None, axis: int) -> int | None:
    """The length of an axis; None where it varies or is not known."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    found = value.shape[axis]
    return found if isinstance(found, int) else None


def is_last(axis: int | None, value: ir.Value | None) -> bool:
    """Whether an axis is a value's last."""
    known = rank(value)
    return axis == -1 or (axis is not None and known is not None and axis == known - 1)
