"""Channels that are cut out of a tensor: by Slice or by Split, on the last axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import onnx_ir as ir

from .patterns import integers, is_last, producer, size


class Part(NamedTuple):
    """The channels from `start` to `stop` of a tensor, each `step`-th."""

    x: ir.Value
    start: int
    stop: int
    step: int


def part(value: ir.Value | None) -> Part | None:
    """Reads what Slice and Split cut out of the last axis."""
    node = producer(value, "Slice", "Split")
    source = node.inputs[0] if node is not None else None
    width = size(source, -1)
    if node is None or source is None or width is None:
        return None
    if node.op_type == "Split":
        sizes = [size(output, -1) or 0 for output in node.outputs]
        if not is_last(node.attributes.get_int("axis", 0), source) or not all(sizes):
            return None
        place = next(index for index, output in enumerate(node.outputs) if output is value)
        return Part(source, sum(sizes[:place]), sum(sizes[: place + 1]), 1)
    given = [integers(number) for number in node.inputs[1:]]
    if len(given) < 3 or any(number is None or len(number) != 1 for number in given):
        return None
    start, stop, axis, step = (*(number[0] for number in given if number is not None), 1)[:4]
    if not is_last(axis, source) or step < 1:
        return None
    begin, end, _ = slice(start, stop).indices(width)
    return Part(source, begin, end, step)


def whole(values: Sequence[ir.Value | None]) -> ir.Value | None:
    """The tensor whose channels these values are, in order and all of them."""
    found = [part(value) for value in values]
    source, end = found[0].x if found and found[0] is not None else None, 0
    for one in found:
        if one is None or one.x is not source or one.start != end or one.step != 1:
            return None
        end = one.stop
    return source if end == size(source, -1) else None
