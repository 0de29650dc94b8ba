"""Placement for OpenVINO on the CPU: that for TensorRT, with uint8 activations and without the limits of Tensor Cores.

OpenVINO too runs a layer on 8-bit numbers where DequantizeLinear stands before it, and writes 8-bit numbers where
nothing but QuantizeLinear follows. A sum goes into the convolution before it where both of what it adds are quantized,
and MaxPool is in 8 bits where Q/DQ stands before it. Without these two, as found in the layers that it executes, each
sum and the pool of ResNet-50 are layers of their own in floats. Other than with Q/DQ for ONNX Runtime, results of
products stay float where floats are read, which is faster in transformers. Attention stays float, one kernel with its
softmax. What a convolution pads becomes symmetric int8 where it is about as large below zero as above: with a zero
point the stem of ResNet-50 takes 1.5 times as long.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

from ..graph import Graph
from .plan import Plan, Use
from .tensorrt import Planner
from .tensorrt_limits import Limits, no_product

_RECURRENT = "8 bits make recurrent layers no faster in OpenVINO"
LIMITS = Limits(
    no_product,
    {"ConvTranspose": "weights of ConvTranspose stay float", **dict.fromkeys(("GRU", "LSTM", "RNN"), _RECURRENT)},
    "attention stays float, one kernel with its softmax",
)


class _Planner(Planner):
    """What OpenVINO does not do by itself."""

    def _residuals(self) -> None:
        super()._residuals()
        for node in self._summed:
            self._read(node, 0, 1)

    def _move(self) -> None:
        """Puts Q/DQ before each MaxPool that nothing but 8-bit layers read."""
        for value, uses in list(self._uses.items()):
            node = value.producer()
            while node is not None and node.op_type == "MaxPool" and not node.domain and len(uses) == len(value.uses()):
                if (source := node.inputs[0]) is None or source.is_graph_input() or value.is_graph_output():
                    break
                del self._uses[value]
                self._read(node, 0)
                value, uses, node = source, self._uses[source], source.producer()


def plan(graph: Graph, *, per_channel: bool = True, keep: Mapping[ir.Node, str] = MappingProxyType({})) -> Plan:
    """Decides what becomes 8-bit in the main graph; shapes and types must be inferred, constants be initializers.

    Args:
        per_channel: one scale for each output channel of a weight; needs opset 13.
        keep: nodes that stay float, and why.
    """
    found = _Planner(graph, ir.DataType.INT8, keep, LIMITS, attention=False).plan(per_channel=per_channel)
    padded = frozenset(name for name, uses in found.activations.items() if any(map(_pads, uses)))
    return dataclasses.replace(found, dtype=ir.DataType.UINT8, symmetric=False, padded=padded)


def _pads(use: Use) -> bool:
    """Whether a convolution reads with zeros around."""
    return use.node is not None and use.node.op_type == "Conv" and any(use.node.attributes.get_ints("pads", [0]))
