"""Products whose bias what comes next can add: a GELU, or the sum before a LayerNormalization.

    Gemm(x, w, b)                   ->  MatMul(x, w) + b
    Reshape(Gemm(x, w, b)) + r      ->  (Reshape(MatMul(x, w)) + b) + r

Of one row ONNX Runtime's Gemm copies the bias to its result first, which takes a GPU as long as a small product.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from ..graph.editing import is_constant
from ..quantization.patch import Patch, Patcher
from .patterns import rank, reader, size


@dataclasses.dataclass(frozen=True)
class Biased:
    """A product with a bias. `view` shows it with other axes before the last one, where a sum reads it so."""

    node: ir.Node
    view: ir.Node | None

    @property
    def last(self) -> ir.Node:
        """What gives the same before and after."""
        return self.view or self.node


def biased(node: ir.Node) -> Biased | None:
    """The product of a node whose bias can be added after it."""
    if node.domain or node.op_type != "Gemm" or len(node.inputs) < 3:
        return None
    _, weight, bias = node.inputs[:3]
    plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    if not plain or node.attributes.get_int("transA", 0) != 0 or not (is_constant(weight) and is_constant(bias)):
        return None
    result = node.outputs[0]
    if rank(bias) != 1 or size(bias, 0) != size(result, -1):
        return None
    after = reader(result)
    if after is None or after.op_type != "Reshape":
        return Biased(node, None)
    shown = after.outputs[0]
    summed = any(use.node.op_type == "Add" and not use.node.domain for use in shown.uses())
    return Biased(node, after) if summed and size(shown, -1) == size(bias, 0) else None


def split(patcher: Patcher, patch: Patch, found: Biased) -> None:
    """Fills a patch of the last node of `found`."""
    node, result = found.node, found.last.outputs[0]
    x, weight, bias = node.inputs[:3]
    dtype = result.dtype or ir.DataType.FLOAT
    if node.attributes.get_int("transB", 0):
        assert weight is not None
        assert weight.const_value is not None
        weight = patcher.initializer(f"{patch.title}/weight", np.ascontiguousarray(weight.const_value.numpy().T))
    (made,) = patch.add("MatMul", [x, weight], [(f"{patch.title}/product", dtype, node.outputs[0].shape)])
    if found.view is not None:
        inputs = [made, *found.view.inputs[1:]]
        (made,) = patch.add("Reshape", inputs, [(f"{patch.title}/shown", dtype, result.shape)])
    patch.apply(*patch.add("Add", [made, bias], [(f"{patch.title}/biased", dtype, result.shape)], main=True))
