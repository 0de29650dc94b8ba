"""Bias correction: takes the shift that quantized weights cause in a layer's mean output back in its bias.

    E[Wq x] - E[W x]  =  (Wq - W) E[x]        so        b' = b + (W - Wq) E[x]

(Nagel et al. 2019, section 4.2, with E[x] measured.) For a Conv the mean of a channel stands for the mean at each place
of the kernel. At borders, where zeros are padded, it is not that, and the shift is taken to be as inside. The mean is
over all positions, tokens that only fill a batch up among them: data without such filling serves better.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ...passes.base import Refusal
from ..graph import Graph
from ..graph.selection import label
from .layers import Layer, as_layer, assign_input, constant, initializer, is_shared, is_weight, operand
from .plan import Weight
from .qdq import Quantized

if TYPE_CHECKING:
    from ..calibration import TensorStatistics


def correct(
    graph: Graph, weights: Mapping[Weight, Quantized], statistics: Mapping[str, TensorStatistics]
) -> tuple[dict[str, int], list[Refusal]]:
    """Corrects the biases of the layers whose weights are about to be quantized, in the float graph.

    Args:
        graph: the float graph that the weights are read in; its biases change, its weights do not.
        weights: the weights as they will be quantized.
        statistics: of the inputs of these layers, with means of their channels.

    Returns counts by kind of change, and for each layer left as it was, why.
    """
    refusals = []
    corrected = 0
    for weight, quantized in weights.items():
        layer = as_layer(weight.use.node) if weight.use.node is not None else None
        if layer is None or weight.use.place != 1:
            continue
        reason = _correct(graph, layer, quantized, statistics)
        if reason is None:
            corrected += 1
        else:
            refusals.append(Refusal(reason, layer.name))
    return ({"biases corrected": corrected} if corrected else {}), refusals


def shift(layer: Layer, quantized: Quantized, mean: np.ndarray) -> np.ndarray:
    """What to add to the bias (out,), given the means of the input channels."""
    error = layer.load() - layer.viewed(quantized.real())
    by_channel = error.reshape(layer.groups, -1, error.shape[1], int(np.prod(error.shape[2:]))).sum(axis=3)
    total = np.einsum("goi,gi->go", by_channel, mean.reshape(layer.groups, -1))
    return np.asarray(total.reshape(-1), np.float32)


def _correct(
    graph: Graph, layer: Layer, quantized: Quantized, statistics: Mapping[str, TensorStatistics]
) -> str | None:
    """Corrects one layer; where that cannot be, why."""
    value = operand(layer.node, 0)
    found = statistics.get(value.name or "")
    if value.shape is None or found is None or found.channel_mean is None:
        return f"the means of the channels of {value.name!r} are not known"
    if (found.channel_axis or 0) % len(value.shape) != layer.channel_axis(len(value.shape)):
        return f"the means of {value.name!r} are along another axis"
    return add_to_bias(graph, layer, shift(layer, quantized, found.channel_mean))


def add_to_bias(graph: Graph, layer: Layer, change: np.ndarray) -> str | None:
    """Adds a number for each output (out,) to what a layer gives; where that cannot be, why.

    A Conv or Gemm without a bias gets one; for MatMul it is the constant that an Add behind it adds.
    """
    if layer.node.op_type == "MatMul":
        return _add_behind(graph, layer, change)
    if len(layer.node.inputs) < 3 or layer.node.inputs[2] is None:
        layer.node.resize_inputs(3)
        layer.node.replace_input_with(2, initializer(graph, f"{layer.weight.name}/bias", change))
        return None
    return _add(graph, layer.node, 2, change)


def _add_behind(graph: Graph, layer: Layer, change: np.ndarray) -> str | None:
    result = layer.node.outputs[0]
    users = list(result.uses())
    if is_shared(result) or not users or users[0].node.op_type != "Add":
        return "no Add follows this MatMul alone, and one more would cost time"
    return _add(graph, users[0].node, 1 - users[0].idx, change)


def _add(graph: Graph, node: ir.Node, index: int, change: np.ndarray) -> str | None:
    bias = operand(node, index)
    if not is_weight(bias):
        return f"the bias {bias.name!r} is not constant"
    array = constant(bias)
    if array.size not in (1, len(change)) or (array.ndim and array.shape[-1] != array.size):
        return f"the bias {bias.name!r} is not one number for each output of {label(node)!r}"
    assign_input(node, index, np.asarray(array + change, np.float32), graph)
    return None
