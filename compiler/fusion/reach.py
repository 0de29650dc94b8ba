"""How far rows reach into their caches, as com.microsoft's GroupQueryAttention wants to know it.

    filled      the longest row: the largest position, and one
    room        the whole cache, but of several tokens of several rows, which are prompts then, their length

The operator reads it in the host's memory. A GPU has positions in its own, and shapes in the host's: `room` is made of
these alone, so that a call needs no copy and can be a CUDA graph. It may be more than what is filled.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir

from ..quantization.patch import Patch, Patcher

Kind = Literal["filled", "room"]


class Reach:
    """Makes both inputs of the operator, for all layers once."""

    def __init__(self, patcher: Patcher, kind: Kind) -> None:
        self._patcher = patcher
        self._kind = kind
        self._made: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def __call__(self, patch: Patch, positions: ir.Value, room: int | None) -> tuple[ir.Value, ir.Value]:
        """The last position of each row (batch), and how many positions the longest row has, a scalar; of int32.

        Args:
            positions: (batch, time), of int64.
            room: tokens that a cache holds.
        """
        if positions not in self._made:
            self._made[positions] = self._last_and_most(patch, positions, room)
        return self._made[positions]

    def _last_and_most(self, patch: Patch, positions: ir.Value, room: int | None) -> tuple[ir.Value, ir.Value]:
        integer, batch = ir.DataType.INT32, ir.Shape([None])
        title = positions.name or "positions"
        place = self._patcher.initializer(f"{title}/place", np.array(-1))
        (last,) = patch.add("Gather", [positions, place], [(f"{title}/last", ir.DataType.INT64, batch)], {"axis": 1})
        (last,) = patch.add("Cast", [last], [(f"{title}/last32", integer, batch)], {"to": integer.value})
        if self._kind == "filled" or room is None:
            return last, self._filled(patch, title, last)
        return last, self._of_shapes(patch, title, positions, room)

    def _filled(self, patch: Patch, title: str, last: ir.Value) -> ir.Value:
        integer, scalar = ir.DataType.INT32, ir.Shape([])
        (most,) = patch.add("ReduceMax", [last], [(f"{title}/most", integer, scalar)], {"keepdims": 0})
        one = self._patcher.initializer(f"{title}/one", np.array(1, np.int32))
        return patch.add("Add", [most, one], [(f"{title}/length", integer, scalar)])[0]

    def _of_shapes(self, patch: Patch, title: str, positions: ir.Value, room: int) -> ir.Value:
        integer, long, scalar = ir.DataType.INT32, ir.DataType.INT64, ir.Shape([])
        one = self._patcher.initializer(f"{title}/one", np.array(1))
        whole = self._patcher.initializer(f"{title}/room", np.array(room))
        (shape,) = patch.add("Shape", [positions], [(f"{title}/shape", long, ir.Shape([2]))])
        (time,) = patch.add("Gather", [shape, one], [(f"{title}/time", long, scalar)], {"axis": 0})
        (least,) = patch.add("ReduceMin", [shape], [(f"{title}/least", long, scalar)], {"keepdims": 0})
        (prompts,) = patch.add("Greater", [least, one], [(f"{title}/prompts", ir.DataType.BOOL, scalar)])
        (most,) = patch.add("Where", [prompts, time, whole], [(f"{title}/most", long, scalar)])
        return patch.add("Cast", [most], [(f"{title}/length", integer, scalar)], {"to": integer.value})[0]
