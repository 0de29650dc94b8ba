"""Rounds weights so that what a layer gives on data changes least, instead of each weight to its nearest step.

GPTQ (Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization"): weights are rounded one input after the other,
and those not rounded yet make up for the error, by the Hessian of the layer's squared error, H = sum x x^T. Errors on
inputs that go together cancel; with independent inputs it is rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from ...passes.base import Refusal
from ..graph import Graph
from ..graph.selection import label
from ..sparsity.pattern import is_sparse
from .compensation import DAMPING, compensated, factored, squared_error
from .hessians import hessians
from .layers import Layer, as_layer, constant, is_shared
from .parameters import Parameters
from .plan import Weight
from .qdq import Quantized


def round_weights(
    graph: Graph, parameters: Mapping[Weight, Parameters], samples: Iterable[Mapping[str, np.ndarray]], *, seed: int = 0
) -> tuple[dict[Weight, Quantized], list[Refusal]]:
    """Rounds the constants of a plan's layers by GPTQ, on the float graph that the plan was made on.

    A channel that GPTQ makes no better than rounding to nearest is rounded to nearest.

    Args:
        parameters: of each of the plan's weights.
        samples: gone through once or more, see `hessians`.
        seed: of the positions that are looked at.

    Returns every weight rounded, by GPTQ or to nearest, and for those that had to be to nearest, why.

    Raises:
        GraphError: ONNX Runtime refuses the graph or the samples.
        TargetUnavailableError: ONNX Runtime is not installed.
    """
    found: dict[Weight, Quantized] = {}
    refusals = []
    layers: dict[Layer, Weight] = {}
    for weight, chosen in parameters.items():
        layer = _layer(weight, chosen)
        if isinstance(layer, Layer):
            layers[layer] = weight
            continue
        refusals.append(Refusal(f"rounded to nearest: {layer}", label(weight.use.node) if weight.use.node else ""))
        found[weight] = Quantized.nearest(constant(weight.value), chosen)
    for alike, hessian in hessians(graph, list(layers), samples, seed=seed):
        for layer in alike:
            weight = layers[layer]
            found[weight] = _rounded(layer, hessian, parameters[weight])
    return {weight: found[weight] for weight in parameters}, refusals


def _layer(weight: Weight, parameters: Parameters) -> Layer | str:
    """The layer that reads a weight; where GPTQ cannot round it, why."""
    layer = as_layer(weight.use.node) if weight.use.node is not None else None
    if layer is None or weight.use.place != 1:
        return "it is not the weight of a Conv, Gemm or MatMul"
    if is_shared(layer.weight):
        return "its weights are shared"
    if weight.axis not in (None, layer.output_axis):
        return "its scales are not those of output channels"
    return layer if weight.dtype == ir.DataType.INT8 else f"it becomes {weight.dtype}"


def _rounded(layer: Layer, hessian: np.ndarray, parameters: Parameters) -> Quantized:
    weight = layer.load()
    nearest = layer.viewed(parameters.quantize(layer.viewed(weight))).reshape(len(hessian), -1, hessian.shape[-1])
    rows = weight.reshape(nearest.shape)
    scales = np.broadcast_to(parameters.scale.reshape(-1), len(weight)).reshape(len(hessian), -1)
    result = np.empty_like(nearest)
    sparse = is_sparse(weight)
    for group, moments in enumerate(hessian):
        scale = scales[group]
        bounds = _pinned(rows[group], parameters.bounds) if sparse else parameters.bounds
        candidate = gptq(rows[group], moments, scale, bounds)
        errors = [squared_error(rows[group] - scale[:, None] * q, moments) for q in (candidate, nearest[group])]
        result[group] = np.where((errors[0] < errors[1])[:, None], candidate, nearest[group])
    array = layer.viewed(result.reshape(weight.shape).astype(nearest.dtype))
    return Quantized(np.ascontiguousarray(array), parameters)


def _pinned(rows: np.ndarray, bounds: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of each weight that leave the zeros of a 2:4 pattern at zero, whatever error they could make up for."""
    return np.where(rows == 0, 0, bounds[0]), np.where(rows == 0, 0, bounds[1])


def gptq(
    weight: np.ndarray,
    hessian: np.ndarray,
    scale: np.ndarray,
    bounds: tuple[int, int] | tuple[np.ndarray, np.ndarray],
    *,
    damping: float = DAMPING,
) -> np.ndarray:
    """Rounds weights (out, in) to integers within `bounds`.

    Inputs with the largest second moment come first, while there is still much to make up with. An input that the
    data never used takes no part, and its weights are rounded to nearest.

    Args:
        weight: (out, in).
        hessian: (in, in), the sum of x x^T over the data, in any unit.
        scale: of shape (), (out,) or (out, in).
        bounds: smallest and largest integer, each for all weights or (out, in).
        damping: see `DAMPING`.
    """
    order = np.argsort(-np.diag(hessian), kind="stable")
    steps = np.asarray(scale, np.float32)
    steps = np.broadcast_to(steps if steps.ndim == 2 else steps.reshape(-1, 1), weight.shape)[:, order]
    low, high = (np.broadcast_to(bound, weight.shape)[:, order] for bound in bounds)
    rounded = np.empty(weight.shape, np.float32)

    def settle(i: int, left: np.ndarray) -> np.ndarray:
        rounded[:, i] = np.clip(np.rint(left[:, 0] / steps[:, i]), low[:, i], high[:, i])
        return np.asarray(rounded[:, i] * steps[:, i])

    compensated(weight[:, order], factored(hessian[np.ix_(order, order)], damping), settle)
    result = np.empty_like(rounded)
    result[:, order] = rounded
    return result.astype(np.int32)
