"""Placement for OpenVINO on the CPU: that for TensorRT, with uint8 activations and without the limits of Tensor Cores.

OpenVINO too runs a layer on 8-bit numbers where DequantizeLinear stands before it, writes 8-bit numbers where nothing
but QuantizeLinear follows, and takes a sum with a quantized skip branch into the convolution before it. Zero points
cost it nothing. Other than with Q/DQ for ONNX Runtime, results of products stay float where floats are read, which is
faster in transformers. Attention stays float, one kernel with its softmax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

from ..graph import Graph
from .plan import Plan
from .tensorrt import Planner
from .tensorrt_limits import Limits, no_product

_RECURRENT = "8 bits make recurrent layers no faster in OpenVINO"
LIMITS = Limits(
    no_product,
    {"ConvTranspose": "weights of ConvTranspose stay float", **dict.fromkeys(("GRU", "LSTM", "RNN"), _RECURRENT)},
    "attention stays float, one kernel with its softmax",
)


def plan(graph: Graph, *, per_channel: bool = True, keep: Mapping[ir.Node, str] = MappingProxyType({})) -> Plan:
    """Decides what becomes 8-bit in the main graph; shapes and types must be inferred, constants be initializers.

    Args:
        per_channel: one scale for each output channel of a weight; needs opset 13.
        keep: nodes that stay float, and why.
    """
    found = Planner(graph, ir.DataType.INT8, keep, LIMITS, attention=False).plan(per_channel=per_channel)
    return dataclasses.replace(found, dtype=ir.DataType.UINT8, symmetric=False)
