"""Quantizes the constants of a plan: scales, and biases in steps of the products that they are added to.

Rounding that looks at data is in `rounding`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from ..graph import Graph
from ..graph.editing import is_constant
from .layers import constant
from .parameters import Parameters, bias_parameters, weight_parameters, widened_for_bias
from .plan import Bias, Plan, Weight
from .qdq import Quantized


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
            array = constant(weight.value)
            known[key] = weight_parameters(array, weight.axis, weight.dtype, search=search, reduce_range=reduce_range)
        found[weight] = known[key]
    return found


def fit_biases(
    plan: Plan, weights: Mapping[Weight, Parameters], activations: Mapping[str, Parameters]
) -> dict[Weight, Parameters]:
    """The weights' parameters, with scales raised where a bias would overflow int32."""
    fitted = dict(weights)
    for bias in plan.biases:
        flat = constant(bias.value).reshape(-1)
        fitted[bias.weight] = widened_for_bias(fitted[bias.weight], flat, activations[bias.input].scale)
    return fitted


def widen_for_biases(
    plan: Plan, weights: Mapping[Weight, Quantized], activations: Mapping[str, Parameters]
) -> dict[Weight, Quantized]:
    """The weights, anew and to nearest where a bias would overflow int32 by now, as one that was corrected may.

    Next to such a bias the rounding of the weights is nothing.
    """
    fitted = fit_biases(plan, {weight: found.parameters for weight, found in weights.items()}, activations)
    return {
        weight: found
        if fitted[weight] is found.parameters
        else Quantized.nearest(constant(weight.value), fitted[weight])
        for weight, found in weights.items()
    }


def round_to_nearest(weights: Mapping[Weight, Parameters]) -> dict[Weight, Quantized]:
    """The weights in numbers of their parameters."""
    return {weight: Quantized.nearest(constant(weight.value), found) for weight, found in weights.items()}


def quantize_biases(
    plan: Plan, weights: Mapping[Weight, Parameters], activations: Mapping[str, Parameters]
) -> dict[Bias, Quantized]:
    """The biases as int32, of shape (channels,)."""
    found = {}
    for bias in plan.biases:
        flat = constant(bias.value).reshape(-1)
        parameters = bias_parameters(activations[bias.input].scale, weights[bias.weight])
        found[bias] = Quantized.nearest(flat, parameters)
    return found


def broken_weights(graph: Graph) -> dict[ir.Node, str]:
    """Nodes whose weight holds NaN or Inf."""
    broken = {}
    for node in graph.model.graph:
        weight = node.inputs[1] if node.op_type in ("Conv", "Gemm", "MatMul") and len(node.inputs) > 1 else None
        if weight is None or not is_constant(weight) or weight.const_value is None or weight.dtype != ir.DataType.FLOAT:
            continue
        if not np.isfinite(weight.const_value.numpy()).all():
            broken[node] = f"its weight {weight.name!r} holds NaN or Inf"
    return broken
