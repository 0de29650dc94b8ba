"""What the new positions of a dimension hold, followed through the graph before anything is changed.

The weights of new positions are 0, so what is made first is 0. From there on a lane, which is what stands at the new
positions of one tensor, is one of

    a number        the same in all of them: 0 before an activation f, f(0) behind it
    finite          numbers that depend on the input
    unsafe          perhaps NaN or infinite: log(0), 1 / 0, 0 / 0

A sum over new positions must add nothing: of two factors one has to be 0 and the other finite, since 0 * NaN is NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator


@dataclasses.dataclass(frozen=True)
class Lane:
    """What new positions hold. `number` is None where it is not known, or not the same in all of them."""

    number: float | None = None
    safe: bool = True

    @property
    def is_zero(self) -> bool:
        """Whether it adds nothing to a sum."""
        return self.number == 0


ZERO, FINITE, UNSAFE = Lane(0.0), Lane(), Lane(safe=False)


@dataclasses.dataclass(frozen=True)
class Operand:
    """An input of a node, as one dimension sees it.

    Attributes:
        lane: what it holds at new positions; None where the dimension is none of its axes.
        array: its numbers, of a constant that does not have the dimension.
        dtype: of its elements.
    """

    lane: Lane | None
    array: np.ndarray | None
    dtype: ir.DataType | None

    @property
    def known(self) -> np.ndarray | None:
        """The numbers that stand there; None where they are not known."""
        if self.lane is None:
            return self.array
        return None if self.lane.number is None else np.array(self.lane.number)


def join(lanes: Iterable[Lane]) -> Lane:
    """What may hold any of these."""
    found = set(lanes)
    if UNSAFE in found or not found:
        return UNSAFE
    return found.pop() if len(found) == 1 else FINITE


def of(array: np.ndarray) -> Lane:
    """The lane that holds these numbers."""
    numbers = np.asarray(array, dtype=np.float64).reshape(-1)
    if not numbers.size or not np.isfinite(numbers).all():
        return UNSAFE
    return Lane(float(numbers[0])) if (numbers == numbers[0]).all() else FINITE


def computed(node: ir.Node, operands: Sequence[Operand | None], opset: int) -> Lane | None:
    """What an elementwise node makes of numbers that are known, by ONNX's reference; None where one is not known."""
    given = {f"x{place}": operand for place, operand in enumerate(operands) if operand is not None}
    known = [operand.known for operand in given.values()]
    if node.domain or any(array is None for array in known):
        return None
    proto = ir.serde.serialize_node(node)
    del proto.input[:], proto.output[:]
    proto.input.extend(f"x{place}" if operand is not None else "" for place, operand in enumerate(operands))
    proto.output.append("y")
    untyped = [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in (*given, "y")]
    graph = onnx.helper.make_graph([proto], "lane", untyped[:-1], untyped[-1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    every = np.meshgrid(*(np.unique(array) for array in known if array is not None))  # each with each of the others
    feeds = {
        name: mesh.reshape(-1).astype(_type(operand))
        for (name, operand), mesh in zip(given.items(), every, strict=True)
    }
    try:
        with np.errstate(all="ignore"):
            (made,) = ReferenceEvaluator(model).run(None, feeds)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):  # the reference has gaps
        return None
    return of(np.asarray(made))


def _type(operand: Operand) -> np.dtype[Any] | type[np.float32]:
    """Of the tensor; float32 stands for all floats, since the graph may be lowered later."""
    return np.float32 if operand.dtype is None or operand.dtype.is_floating_point() else operand.dtype.numpy()
