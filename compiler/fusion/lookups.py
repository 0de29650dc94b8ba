"""Masks of padding as transformers reads them: at the number of each row and of each key, spread over both.

    GatherND(mask, [rows, keys])  ->  Unsqueeze(Gather(mask, keys))

Rows are counted, which runtimes do on the host: where a batch may be of any size, that alone would keep an engine from
being one CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ..graph.editing import is_constant
from .patterns import integers, producer, rank, size


class Lookup(NamedTuple):
    """A mask (rows, n) that is read at all rows and at some keys, which gives (rows, 1, 1, keys).

    Attributes:
        keys: their numbers; None where that is all of them, in order.
    """

    node: ir.Node
    mask: ir.Value
    keys: np.ndarray | None


def lookup(node: ir.Node) -> Lookup | None:
    """Reads what gives the entries of a mask."""
    if node.domain or node.op_type != "GatherND" or node.attributes.get_int("batch_dims", 0) != 0:
        return None
    mask, index = node.inputs
    joined = producer(index, "Concat")
    if mask is None or rank(mask) != 2 or joined is None or len(joined.inputs) != 2:
        return None
    (rows, form), (keys, other) = (_spread(value) for value in joined.inputs)
    if rows is None or keys is None or form is not other or not _is_common(form, rows, keys):
        return None
    if not _counts(rows, mask, 0, (1, 2, 3)):
        return None
    if _counts(keys, mask, 1, (0, 1, 2)):
        return Lookup(node, mask, None)
    if not is_constant(keys) or keys.const_value is None or rank(keys) != 4 or size(keys, -1) != keys.const_value.size:
        return None
    numbers = keys.const_value.numpy().reshape(-1)
    ordered = numbers.size == size(mask, 1) and np.array_equal(numbers, np.arange(numbers.size))
    return Lookup(node, mask, None if ordered else numbers)


def _spread(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """What is repeated to a shape of four axes, with one behind them for the numbers of an entry, and the shape."""
    behind = producer(value, "Unsqueeze")
    repeated = producer(behind.inputs[0], "Expand") if behind is not None else None
    if behind is None or repeated is None or integers(behind.inputs[1]) not in ((-1,), (4,)):
        return None, None
    return repeated.inputs[0], repeated.inputs[1]


def _is_common(shape: ir.Value | None, one: ir.Value, other: ir.Value) -> bool:
    """Whether a shape is that to which two tensors are broadcast."""
    node = producer(shape, "Shape")
    if node is None or node.attributes.get_int("start", 0) != 0 or "end" in node.attributes:
        return False
    both = producer(node.inputs[0], "Max", "Add", "Mul")
    return both is not None and tuple(both.inputs) in ((one, other), (other, one))


def _counts(value: ir.Value, mask: ir.Value, axis: int, others: tuple[int, ...]) -> bool:
    """Whether a tensor holds 0, 1, ... up to the length of an axis of a mask, with other axes of length 1."""
    unsqueezed = producer(value, "Unsqueeze")
    counted = producer(unsqueezed.inputs[0], "Range") if unsqueezed is not None else None
    if unsqueezed is None or counted is None or integers(unsqueezed.inputs[1]) != others:
        return False
    start, end, step = counted.inputs
    return integers(start) == (0,) and integers(step) == (1,) and _is_length(end, mask, axis)


def _is_length(value: ir.Value | None, mask: ir.Value, axis: int) -> bool:
    """Whether a number is the length of an axis of a mask, of which the shape that it is of has the name too."""
    number = producer(value, "Squeeze", "Gather")
    shape = producer(number.inputs[0], "Shape") if number is not None else None
    if number is None or shape is None or shape.inputs[0] is None or shape.inputs[0].shape is None:
        return False
    place = shape.attributes.get_int("start", 0)
    if number.op_type == "Squeeze":
        if shape.attributes.get_int("end", -1) != place + 1:
            return False
    elif (chosen := integers(number.inputs[1])) is not None and len(chosen) == 1:
        place += chosen[0]
    else:
        return False
    found, wanted = (given.shape[at] if given.shape else None for given, at in ((shape.inputs[0], place), (mask, axis)))
    return isinstance(found, ir.SymbolicDim) and found.value is not None and found == wanted
