"""Writes nodes one after the other: of the main graph, or of a branch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..graph.schemas import MICROSOFT
from ..quantization.patch import Attributes, Patcher

INTEGER = ir.DataType.INT64


class Constants:
    """Constants of the main graph, each once, and names."""

    def __init__(self, patcher: Patcher) -> None:
        self.patcher = patcher
        self._known: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def __call__(self, array: np.ndarray) -> ir.Value:
        """A constant."""
        key = str(array.dtype), array.shape, array.tobytes()
        if key not in self._known:
            self._known[key] = self.patcher.initializer("sparse_attention/constant", array)
        return self._known[key]

    def shape(self, *sizes: int) -> ir.Value:
        """Integers: a shape, of which 0 stands for the size that was there, -1 for the rest; axes; a size."""
        return self(np.array(sizes, np.int64))


class Nodes:
    """Nodes in the order in which they were written.

    Args:
        title: what their names begin with.
        dtype: of what floating point operators give.
    """

    def __init__(self, constants: Constants, title: str, dtype: ir.DataType) -> None:
        self.constants = constants
        self.shape = constants.shape
        self.dtype = dtype
        self.nodes: list[ir.Node] = []
        self._title = title
        self._patcher = constants.patcher

    def add(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: Attributes | None = None,
        *,
        dtypes: Sequence[ir.DataType] | None = None,
        domain: str = "",
    ) -> tuple[ir.Value, ...]:
        """Writes a node; `dtypes` are those of its outputs, one of the floating point type by default."""
        name = f"{self._title}/{operator}"
        outputs = [
            ir.Value(name=self._patcher.name(name), type=ir.TensorType(dtype)) for dtype in dtypes or (self.dtype,)
        ]
        node = ir.node(operator, inputs, attributes, domain=domain, outputs=outputs, name=self._patcher.node_name(name))
        self.nodes.append(node)
        if domain == MICROSOFT:
            self._patcher.graph.model.opset_imports.setdefault(MICROSOFT, 1)
        return tuple(outputs)

    def __call__(
        self, operator: str, *inputs: ir.Value, dtype: ir.DataType | None = None, **attributes: int | Sequence[int]
    ) -> ir.Value:
        """Writes a node of one output, which it gives."""
        (value,) = self.add(operator, inputs, attributes, dtypes=(dtype or self.dtype,))
        return value

    def integer(self, operator: str, *inputs: ir.Value, **attributes: int | Sequence[int]) -> ir.Value:
        """Writes a node that gives integers."""
        return self(operator, *inputs, dtype=INTEGER, **attributes)

    def truth(self, operator: str, *inputs: ir.Value) -> ir.Value:
        """Writes a node that gives truth values."""
        return self(operator, *inputs, dtype=ir.DataType.BOOL)

    def number(self, value: float) -> ir.Value:
        """A floating point constant."""
        return self.constants(np.array(value, self.dtype.numpy()))

    def whole(self, value: int) -> ir.Value:
        """An integer constant."""
        return self.constants(np.array(value, np.int64))

    def reshape(self, value: ir.Value, *sizes: int) -> ir.Value:
        """In another shape, see `Constants.shape`."""
        return self("Reshape", value, self.shape(*sizes), dtype=value.dtype)

    def transpose(self, value: ir.Value, *perm: int) -> ir.Value:
        """With axes in another order."""
        return self("Transpose", value, dtype=value.dtype, perm=perm)

    def top(self, value: ir.Value, count: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The largest along the last axis, and where they are."""
        values, places = self.add("TopK", [value, count], {"axis": -1}, dtypes=(self.dtype, INTEGER))
        return values, places

    def branch(self, name: str, result: ir.Value) -> ir.Graph:
        """A branch of these nodes."""
        return ir.Graph([], [result], nodes=self.nodes, name=name)
