"""What is added to the scores of attention over a cache beside its mask: a bias for each head, as ALiBi has.

    Softmax(scale * q k^T + (mask + bias)) v     bias (heads, 1, length) or (batch or 1, heads, 1 or time, length)

GroupQueryAttention makes the mask itself, and takes the bias of as many keys as the longest row has, for each query.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..quantization.patch import Patch, Patcher
from .patterns import pairs, producer, rank, size


def bias_in(mask: ir.Value, heads: int, length: int | None) -> ir.Value | None:
    """The bias of `heads` that was added to a mask, or chosen between with it; None where there is none."""
    candidates = [bias for bias, other in pairs(producer(mask, "Add")) if _of_all_heads(other)]
    where = producer(mask, "Where")
    candidates += [value for value in (where.inputs[1:] if where is not None else ()) if value is not None]
    return next((value for value in candidates if _is_bias(value, heads, length)), None)


def _is_bias(value: ir.Value, heads: int, length: int | None) -> bool:
    return rank(value) in (3, 4) and size(value, -3) == heads and length is not None and size(value, -1) == length


def _of_all_heads(value: ir.Value) -> bool:
    return rank(value) == 4 and size(value, 1) == 1


class Biases:
    """Makes biases as the operator takes them, each once."""

    def __init__(self, patcher: Patcher) -> None:
        self._patcher = patcher
        self._made: dict[ir.Value, ir.Value] = {}

    def operand(self, patch: Patch, bias: ir.Value, positions: ir.Value, most: ir.Value) -> ir.Value:
        """(batch or 1, heads, time, keys), of a bias of all keys that there may be.

        Args:
            positions: of the queries, (batch, time).
            most: how many keys the longest row has, a number of int32.
        """
        if bias in self._made:
            return self._made[bias]
        dtype, axes, value = bias.dtype or ir.DataType.FLOAT, list(bias.shape or ()), bias
        if len(axes) == 3:
            axes = [1, *axes]
            first = self._constant("first", [0])
            (value,) = patch.add("Unsqueeze", [value, first], [(f"{patch.title}/bias4", dtype, ir.Shape(axes))])
        numbers, one = ir.DataType.INT64, ir.Shape([1])
        (count,) = patch.add("Cast", [most], [(f"{patch.title}/most64", numbers, ir.Shape([]))], {"to": numbers.value})
        (count,) = patch.add(
            "Reshape", [count, self._constant("vector", [-1])], [(f"{patch.title}/keys", numbers, one)]
        )
        sliced = [value, self._constant("start", [0]), count, self._constant("last", [3])]
        (value,) = patch.add("Slice", sliced, [(f"{patch.title}/reached", dtype, ir.Shape([*axes[:3], None]))])
        if axes[2] == 1:
            (time,) = patch.add("Shape", [positions], [(f"{patch.title}/time", numbers, one)], {"start": 1, "end": 2})
            ones = self._constant("ones", [1, 1])
            (shape,) = patch.add(
                "Concat", [ones, time, self._constant("one", [1])],
                [(f"{patch.title}/shape", numbers, ir.Shape([4]))], {"axis": 0},
            )  # fmt: skip
            output = (f"{patch.title}/bias", dtype, ir.Shape([axes[0], axes[1], None, None]))
            (value,) = patch.add("Expand", [value, shape], [output])
        self._made[bias] = value
        return value

    def _constant(self, name: str, numbers: list[int]) -> ir.Value:
        return self._patcher.initializer(f"bias/{name}", np.array(numbers, np.int64))
