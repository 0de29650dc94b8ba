"""Quantizes the constants of a plan: scales, rounding, and biases in steps of the products that they are added to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from ..data import Samples
from ..graph import Graph
from .hessians import hessians
from .layers import Layer, as_layer
from .parameters import Parameters, bias_parameters, weight_parameters, widened_for_bias
from .plan import Bias, Plan, Weight
from .qdq import Quantized
from .rounding import gptq

Rounding = Literal["nearest", "gptq"]


def weight_ranges(weights: Iterable[Weight], *, search: bool, reduce_range: bool) -> dict[Weight, Parameters]:
    """Parameters for each weight; equal ones for uses of one constant.

    Raises:
        ValueError: a weight holds NaN or Inf.
    """
    known: dict[object, Parameters] = {}
    found = {}
    for weight in weights:
        key = weight.value, weight.axis, weight.dtype
        if key not in known:
            array = _array(weight)
            known[key] = weight_parameters(array, weight.axis, weight.dtype, search=search, reduce_range=reduce_range)
        found[weight] = known[key]
    return found


def fit_biases(
    plan: Plan, weights: Mapping[Weight, Parameters], activations: Mapping[str, Parameters]
) -> dict[Weight, Parameters]:
    """The weights' parameters, with scales raised where a bias would overflow int32."""
    fitted = dict(weights)
    for bias in plan.biases:
        flat = _array(bias).reshape(-1)
        fitted[bias.weight] = widened_for_bias(fitted[bias.weight], flat, activations[bias.input].scale)
    return fitted


def round_weights(
    graph: Graph, weights: Mapping[Weight, Parameters], rounding: Rounding, samples: Samples | None
) -> dict[Weight, Quantized]:
    """The weights in numbers of their parameters; with "gptq", layers that are no such stay with nearest.

    Raises:
        GraphError: ONNX Runtime cannot run the samples.
    """
    rounded = {weight: Quantized.nearest(_array(weight), found) for weight, found in weights.items()}
    if rounding == "nearest" or samples is None:
        return rounded
    layers = {weight.use.node: weight for weight in weights if weight.use.node is not None}
    chosen = [layer for node in layers if (layer := as_layer(node)) is not None]
    for alike, hessian in hessians(graph, chosen, samples):
        for layer in alike:
            weight = layers[layer.node]
            rounded[weight] = _gptq(layer, hessian, weights[weight])
    return rounded


def _gptq(layer: Layer, hessian: np.ndarray, parameters: Parameters) -> Quantized:
    """The Hessian is (groups, n, n) with n = in/groups x kernel."""
    weight = layer.load()
    grouped = weight.reshape(len(hessian), -1, hessian.shape[1])
    scales = np.broadcast_to(parameters.scale, len(weight)).reshape(len(hessian), -1)
    integers = [gptq(w, h, s, parameters.bounds) for w, h, s in zip(grouped, hessian, scales, strict=True)]
    stored = layer.viewed(np.stack(integers).reshape(weight.shape)).astype(parameters.zero_point.dtype)
    return Quantized(np.ascontiguousarray(stored), parameters)


def quantize_biases(
    plan: Plan, weights: Mapping[Weight, Parameters], activations: Mapping[str, Parameters]
) -> dict[Bias, Quantized]:
    """The biases as int32, of shape (channels,)."""
    found = {}
    for bias in plan.biases:
        flat = _array(bias).reshape(-1)
        parameters = bias_parameters(activations[bias.input].scale, weights[bias.weight])
        found[bias] = Quantized.nearest(flat, parameters)
    return found


def _array(constant: Weight | Bias) -> np.ndarray:
    tensor = constant.value.const_value
    if tensor is None:
        raise ValueError(f"{constant.value.name!r} is no constant")
    return tensor.numpy()
