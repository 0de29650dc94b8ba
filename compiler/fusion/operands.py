"""Queries, keys and values before they are multiplied, and the tensors that their heads were split out of."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from .patterns import integers, producer, rank, size


class Operand(NamedTuple):
    """Queries, keys or values, in as many of these forms as there are.

    Attributes:
        joined: the tensor (batch, sequence, heads * width).
        turned: the tensor (sequence, batch, heads * width).
        split: the tensor (batch, heads, sequence, width).
        crossed: the tensor (batch, heads, width, sequence), of keys.
        heads, width: None where that varies or is not known.
    """

    joined: ir.Value | None = None
    turned: ir.Value | None = None
    split: ir.Value | None = None
    crossed: ir.Value | None = None
    heads: int | None = None
    width: int | None = None

    @property
    def source(self) -> ir.Value | None:
        """The form that takes least to be joined."""
        return self.joined or self.turned or self.split or self.crossed


def permuted(value: ir.Value | None, perm: tuple[int, ...]) -> ir.Value | None:
    """What is transposed by `perm` to give a value."""
    node = producer(value, "Transpose")
    return node.inputs[0] if node is not None and tuple(node.attributes.get_ints("perm") or ()) == perm else None


def unfolded(value: ir.Value | None) -> ir.Value | None:
    """Of a tensor whose batch and heads were made one axis, that with both; others as they are."""
    node = producer(value, "Reshape")
    return node.inputs[0] if node is not None and rank(node.inputs[0]) == 4 and rank(value) == 3 else value


def split(value: ir.Value | None) -> Operand:
    """Reads (batch, heads, sequence, width), or (batch * heads, sequence, width)."""
    if rank(value) == 3:
        if (before := unfolded(value)) is not value:
            found = split(before)
            return found._replace(width=found.width or _last_length(producer(value, "Reshape")))
        return _turned(permuted(value, (1, 0, 2)), None)
    if (before := permuted(value, (0, 2, 1, 3))) is not None:
        return _joined(before, value)
    node = producer(value, "Reshape")
    if node is not None and rank(node.inputs[0]) == 3:
        found = _turned(permuted(node.inputs[0], (1, 0, 2)), value)
        if found.turned is not None:
            return found
    return Operand(split=value, heads=size(value, 1), width=size(value, 3))


def transposed(value: ir.Value | None) -> Operand:
    """Reads keys (batch, heads, width, sequence), or (batch * heads, width, sequence)."""
    if rank(value) == 3:
        if (before := permuted(value, (0, 2, 1))) is not None:
            return split(before)
        return _turned(permuted(value, (1, 2, 0)), None)
    if (before := permuted(value, (0, 2, 3, 1))) is not None:
        return _joined(before, None)
    if (before := permuted(value, (0, 1, 3, 2))) is not None:
        return split(before)
    if (before := _flat(value)) is not None:
        return split(before)
    return Operand(crossed=value, heads=size(value, 1), width=size(value, 2))


def _flat(value: ir.Value | None) -> ir.Value | None:
    """Of keys that are transposed with batch and heads as one axis, (batch, heads, sequence, width)."""
    outer = producer(value, "Reshape")
    inner = producer(permuted(outer.inputs[0], (0, 2, 1)), "Reshape") if outer is not None else None
    return inner.inputs[0] if inner is not None and rank(inner.inputs[0]) == 4 else None


def _last_length(reshape: ir.Node | None) -> int | None:
    """The length of the last axis that a Reshape asks for, where it is a number."""
    shape = reshape.inputs[1] if reshape is not None else None
    parts = producer(shape, "Concat")
    numbers = integers(parts.inputs[-1] if parts is not None else shape)
    return numbers[-1] if numbers and numbers[-1] > 0 else None


def _joined(value: ir.Value | None, made: ir.Value | None) -> Operand:
    """Reads (batch, sequence, heads, width), made of a tensor with the last two as one axis where it is."""
    heads, width = size(value, 2), size(value, 3)
    node = producer(value, "Reshape")
    source = node.inputs[0] if node is not None and rank(node.inputs[0]) == 3 else None
    whole = size(source, -1)
    if whole and width:
        heads = heads or whole // width
    if whole and heads:
        width = width or whole // heads
    fits = whole is not None and heads is not None and whole == heads * (width or 0)
    return Operand(source if fits else None, None, made, None, heads, width)


def _turned(value: ir.Value | None, made: ir.Value | None) -> Operand:
    """Reads (sequence, batch * heads, width), made of a tensor (sequence, batch, heads * width)."""
    node = producer(value, "Reshape")
    source = node.inputs[0] if node is not None and rank(node.inputs[0]) == 3 else None
    whole, width = size(source, -1), size(value, -1)
    if not whole or not width or whole % width:
        return Operand(split=made, heads=size(made, 1), width=size(made, 3))
    return Operand(None, source, made, None, whole // width, width)
