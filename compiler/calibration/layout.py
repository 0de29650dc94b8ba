"""Which axis of an activation counts its channels: 1 in the images of a CNN, the last one elsewhere."""

from __future__ import annotations

import onnx_ir as ir

from ..graph import Graph

_CHANNELS_FIRST = frozenset((
    "AveragePool", "BatchNormalization", "Conv", "ConvInteger", "ConvTranspose", "DeformConv", "DepthToSpace",
    "GlobalAveragePool", "GlobalMaxPool", "GroupNormalization", "InstanceNormalization", "LRN", "LpPool", "MaxPool",
    "QLinearConv", "SpaceToDepth",
))  # fmt: skip
_SAME_LAYOUT = frozenset((
    "Abs", "Add", "Cast", "Ceil", "Celu", "Clip", "Concat", "DequantizeLinear", "Div", "Dropout", "Elu", "Erf", "Exp",
    "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Mean", "Min", "Mish", "Mul",
    "Neg", "PRelu", "Pad", "Pow", "QuantizeLinear", "Reciprocal", "Relu", "Resize", "Round", "Selu", "Sigmoid", "Slice",
    "Softplus", "Softsign", "Split", "Sqrt", "Sub", "Sum", "Swish", "Tanh", "ThresholdedRelu", "Where",
))  # fmt: skip


def channel_axes(graph: Graph) -> dict[str, int]:
    """Axis of the channels of each value of the main graph; -1 is the last one."""
    first: set[ir.Value] = set()
    nodes = list(graph.model.graph)
    for node in nodes:
        if node.op_type in _CHANNELS_FIRST:
            first.update(value for value in (node.inputs[0], node.outputs[0]) if value is not None)
    _spread(nodes, first)
    values = (*graph.model.graph.inputs, *(output for node in nodes for output in node.outputs))
    return {value.name: 1 if value in first else -1 for value in values if value.name}


def _spread(nodes: list[ir.Node], first: set[ir.Value]) -> None:
    """Carries the layout through elementwise nodes, forwards and backwards, until nothing changes."""
    before = -1
    while len(first) != before:
        before = len(first)
        for node in (*nodes, *reversed(nodes)):
            if node.op_type not in _SAME_LAYOUT:
                continue
            around = [v for v in (*node.inputs, *node.outputs) if v is not None and v.const_value is None]
            if any(value in first for value in around):
                first.update(value for value in around if value.shape is None or len(value.shape) > 2)
