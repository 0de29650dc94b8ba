"""What is added to the scores of attention: tensors, or choices by Where that have the effect of a sum."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ..graph.editing import is_constant
from .patterns import producer, scalar

_SPREADING = ("Expand", "Identity", "Reshape", "Tile", "Unsqueeze")


class Mask(NamedTuple):
    """A tensor that is added, or a condition.

    Attributes:
        value: what is added; a condition where `masked` is a number.
        masked: what takes the place of scores that are not allowed.
        allowed: what the condition is where scores are allowed.
        folded: whether it is (batch * heads, queries, keys).
    """

    value: ir.Value
    masked: float | None = None
    allowed: bool = True
    folded: bool = False


def as_choice(mask: Mask) -> Mask | None:
    """A mask of zero and minus infinity as the condition that chooses; None where it is none."""
    if mask.masked is not None:
        return mask if np.isneginf(mask.masked) else None
    where = producer(mask.value, "Where")
    condition, yes, no = where.inputs if where is not None else (None, None, None)
    for zero, infinite, allowed in ((yes, no, True), (no, yes, False)):
        if condition is not None and scalar(zero) == 0 and np.isneginf(scalar(infinite) or 0.0):
            return Mask(condition, -np.inf, allowed)
    return None


def all_zero(value: ir.Value) -> bool:
    """Whether a mask masks nothing: zero everywhere, whatever its size."""
    source = _spread(value)
    if (constant := _constant(source)) is not None:
        return constant.dtype.kind == "f" and not constant.any()
    where = producer(source, "Where")
    if where is None:
        return False
    condition = _constant(_spread(where.inputs[0]))
    if condition is None or condition.dtype.kind != "b" or not (condition.all() or not condition.any()):
        return False
    return scalar(where.inputs[1 if condition.all() else 2]) == 0


def _spread(value: ir.Value | None) -> ir.Value | None:
    """What is repeated to give a value."""
    while (node := producer(value, *_SPREADING)) is not None:
        value = node.inputs[0]
    return value


def _constant(value: ir.Value | None) -> np.ndarray | None:
    return value.const_value.numpy() if value is not None and is_constant(value) and value.const_value else None
