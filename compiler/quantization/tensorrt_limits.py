"""Which products by a constant TensorRT has 8-bit kernels for, and where these are slower than fp16.

The sizes are those of the node classifier in Model-Optimizer's ONNX quantizer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import onnx_ir as ir

from ..graph.editing import is_constant

LEAST = 16
"""Fewer channels, rows or columns do not fill a Tensor Core instruction for 8-bit numbers."""

ALIGNED = 8
LARGEST_FP8_FILTER = 32


class Product(NamedTuple):
    """An operator that multiplies input 0 by a constant.

    Attributes:
        ranks: of constants that there are 8-bit kernels for.
        axis: of the constant's output channels.
    """

    ranks: tuple[int, ...]
    axis: int


class Limits(NamedTuple):
    """What a runtime has 8-bit kernels for.

    Attributes:
        why_not: why a product by a constant stays float; empty where it need not.
        no_kernel: operators with weights that stay float, and why.
        attention: why the products around Softmax stay float.
    """

    why_not: Callable[[ir.Node], str]
    no_kernel: Mapping[str, str]
    attention: str


PRODUCTS = {
    "Conv": Product((3, 4, 5), axis=0),
    "Gemm": Product((2,), axis=1),
    "MatMul": Product((2,), axis=1),
}


NO_KERNEL = {
    "ConvTranspose": "TensorRT computes ConvTranspose in fp16, and would dequantize its weight at every call",
    "GRU": "TensorRT has no 8-bit kernel for GRU",
    "LSTM": "TensorRT has no 8-bit kernel for LSTM",
    "RNN": "TensorRT has no 8-bit kernel for RNN",
}


def limits(dtype: ir.DataType) -> Limits:
    """TensorRT's, for INT8 or FLOAT8E4M3FN."""
    attention = "attention stays in fp16, one kernel with its softmax"
    return Limits(functools.partial(why_not, dtype=dtype), NO_KERNEL, attention)


def channel_axis(node: ir.Node) -> int:
    """Axis of the output channels of a product's constant."""
    transposed = node.attributes.get("transB")
    return 0 if transposed is not None and transposed.as_int() else PRODUCTS[node.op_type].axis


def why_not(node: ir.Node, dtype: ir.DataType) -> str:
    """Why a product by a constant cannot be 8-bit, or would be slower than in fp16; empty where neither is so."""
    if reason := no_product(node):
        return reason
    source, weight = node.inputs[0], node.inputs[1]
    assert source is not None
    assert weight is not None
    assert weight.const_value is not None
    shape = [int(size) for size in weight.const_value.shape.numpy()]
    if node.op_type in ("Gemm", "MatMul"):
        return _why_not_matrix(source, shape)
    if dtype == ir.DataType.INT8:
        return _why_not_int8_filter(node, *shape)
    return _why_not_fp8_filter(*shape)


def no_product(node: ir.Node) -> str:
    """Why this is no product of an activation in float32 by a constant that there are 8-bit kernels for."""
    source, weight = node.inputs[0], node.inputs[1]
    if source is None or weight is None or weight.const_value is None or source.dtype != ir.DataType.FLOAT:
        return "its operands are not float32"
    if is_constant(source):
        return "both operands are constants"
    axes, ranks = len(weight.const_value.shape), PRODUCTS[node.op_type].ranks
    return (
        ""
        if axes in ranks
        else f"its weight has {axes} axes; there are 8-bit kernels for {' or '.join(map(str, ranks))}"
    )


def _why_not_matrix(source: ir.Value, shape: list[int]) -> str:
    rows = list(source.shape)[:-1] if source.shape is not None else []
    if rows and all(size == 1 for size in rows):
        return "it multiplies a single vector, which no Tensor Core helps"
    small = min(shape) < LEAST
    return f"its weight is {shape[0]} by {shape[1]}, and 8-bit kernels need {LEAST} of each" if small else ""


def _why_not_int8_filter(node: ir.Node, outputs: int, inputs: int, *window: int) -> str:
    if min(outputs, inputs) >= LEAST:
        return ""
    channels = f"{inputs} to {outputs} channels"
    if _group(node) > 1:
        whole = outputs % ALIGNED == 0 and min(window) >= 3
        return "" if whole else f"{_group(node)} groups of {channels} have no fast 8-bit kernel"
    first = node.inputs[0] is not None and node.inputs[0].is_graph_input()
    aligned = outputs % ALIGNED == 0 or inputs % ALIGNED == 0
    if aligned and (first or max(outputs, inputs) >= LEAST) and len(set(window)) == 1:
        return ""
    return f"it has {channels}; 8-bit kernels need {LEAST}, or square filters and a multiple of {ALIGNED}"


def _why_not_fp8_filter(outputs: int, inputs: int, *window: int) -> str:
    if math.prod(window) > LARGEST_FP8_FILTER:
        return f"its filter has {math.prod(window)} elements, and FP8 kernels take {LARGEST_FP8_FILTER}"
    few = min(outputs, inputs) <= LEAST
    return f"it has {inputs} to {outputs} channels, and FP8 kernels need more than {LEAST}" if few else ""


def _group(node: ir.Node) -> int:
    attribute = node.attributes.get("group")
    return 1 if attribute is None else attribute.as_int()
