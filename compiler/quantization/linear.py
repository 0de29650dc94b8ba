"""MatMul and Gemm with a constant weight, seen as one thing: ``y = x @ weight + bias``."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import numpy as np
import onnx_ir as ir

from .constants import Constants

OPERATORS = frozenset(("Gemm", "MatMul"))


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """A node that multiplies with a constant.

    Attributes:
        x: the activation, its last axis K long.
        weight: array (K, N); transB is undone and alpha multiplied in.
        bias: what is added, broadcast to the result; None where nothing is. A Gemm's beta is multiplied in.
        key: equal for two nodes exactly when their weights are.
        name: the weight's name.
    """

    node: ir.Node
    x: ir.Value
    weight: np.ndarray
    bias: ir.Value | np.ndarray | None
    key: Hashable
    name: str


def linear(node: ir.Node, constants: Constants) -> Linear | str:
    """Reads a MatMul or Gemm; where that is not possible, the reason."""
    x, weight = node.inputs[0], node.inputs[1]
    assert x is not None
    assert weight is not None
    if node.attributes.get_int("transA", 0):
        return "its first operand is transposed (transA)"
    if quantized(weight):
        return "already quantized"
    array = constants.array(weight)
    if array is None:
        if constants.array(x) is not None:
            return "its weight is the first operand; kernels take a quantized weight as the second"
        return "its weight is not constant"
    if array.ndim != 2:
        return f"its weight has {array.ndim} dimensions, kernels take 2"
    if not np.isfinite(array).all():
        return f"weight {weight.name!r} holds NaN or Inf"
    transposed = bool(node.attributes.get_int("transB", 0))
    alpha = node.attributes.get_float("alpha", 1.0)
    bias = _bias(node, constants)
    if isinstance(bias, str):
        return bias
    matrix = array.T if transposed else array
    matrix = matrix if alpha == 1 else matrix * array.dtype.type(alpha)
    return Linear(node, x, matrix, bias, (weight, transposed, alpha), weight.name or "")


def quantized(value: ir.Value) -> bool:
    """Whether a value comes out of DequantizeLinear, possibly moved since."""
    node = value.producer()
    while node is not None and node.op_type in ("Reshape", "Transpose") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "DequantizeLinear"


def _bias(node: ir.Node, constants: Constants) -> ir.Value | np.ndarray | str | None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    beta = node.attributes.get_float("beta", 1.0)
    if bias is None or beta == 0:
        return None
    if beta == 1:
        return bias
    array = constants.array(bias)
    if array is None:
        return f"it scales a bias that is not constant (beta={beta:g})"
    scaled: np.ndarray = array * array.dtype.type(beta)
    return scaled
