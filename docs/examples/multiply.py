"""Multiplies in place of dividing by a constant.

    x / c  ->  x * (1 / c)

Refused: a divisor that is no constant, that is no float, that holds zero, or whose reciprocal is rounded.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from enginesmith.compiler.graph import Graph
from enginesmith.passes.base import Context, Pass, PassResult, Refusal


@dataclasses.dataclass(frozen=True)
class Multiply(Pass):
    """Multiplies by reciprocals, which processors do several times faster than they divide.

    Attributes:
        exact: whether only powers of two count, whose reciprocals are not rounded, so that no result changes.
    """

    exact: bool = True

    name: ClassVar[str] = "multiply"

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Rewrites in place."""
        count, refusals = 0, []
        for node in list(graph.nodes()):
            if (node.domain, node.op_type) != ("", "Div"):
                continue
            reciprocal = self._reciprocal(node.inputs[1])
            if isinstance(reciprocal, str):
                refusals.append(Refusal(reciprocal, node.name or ""))
                continue
            constant = ir.node("Constant", [], {"value": ir.Tensor(reciprocal)})
            assert node.graph is not None
            node.graph.insert_before(node, constant)
            node.replace_input_with(1, constant.outputs[0])
            node.op_type = "Mul"
            count += 1
        return PassResult(bool(count), {"divisions replaced": count} if count else {}, tuple(refusals))

    def _reciprocal(self, value: ir.Value | None) -> np.ndarray | str:
        """One over a constant, or why there is no such thing."""
        tensor = ir.convenience.get_const_tensor(value) if value is not None else None
        if tensor is None or (value is not None and value.is_graph_input()):
            return "the divisor is no constant"
        divisor = tensor.numpy()
        if divisor.dtype not in (np.float16, np.float32, np.float64):
            return f"the divisor is of type {divisor.dtype}"
        if not divisor.all():
            return "the divisor holds zero"
        if self.exact and np.any(np.abs(np.frexp(divisor)[0]) != 0.5):
            return "the reciprocal would be rounded; exact=false allows that"
        return (1 / divisor).astype(divisor.dtype)
