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
from .hessians import hessians
from .layers import Layer, as_layer, constant, is_shared
from .parameters import Parameters
from .plan import Weight
from .qdq import Quantized

DAMPING = 0.01
"""Part of the mean of the Hessian's diagonal that is added to it."""

BLOCK = 128
"""Inputs whose errors are carried to the inputs behind them in one product."""


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
    for group, moments in enumerate(hessian):
        scale = scales[group]
        candidate = gptq(rows[group], moments, scale, parameters.bounds)
        errors = [_error(rows[group] - scale[:, None] * q, moments) for q in (candidate, nearest[group])]
        result[group] = np.where((errors[0] < errors[1])[:, None], candidate, nearest[group])
    array = layer.viewed(result.reshape(weight.shape).astype(nearest.dtype))
    return Quantized(np.ascontiguousarray(array), parameters)


def _error(difference: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Squared error of each output."""
    return np.asarray(((difference @ hessian) * difference).sum(axis=1))


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
    factor = _factor(hessian[np.ix_(order, order)], damping)
    left = weight[:, order].astype(np.float32)
    rounded = np.empty_like(left)
    for start in range(0, left.shape[1], BLOCK):
        stop = min(start + BLOCK, left.shape[1])
        errors = np.empty((len(left), stop - start), np.float32)
        for i in range(start, stop):
            rounded[:, i] = np.clip(np.rint(left[:, i] / steps[:, i]), low[:, i], high[:, i])
            errors[:, i - start] = (left[:, i] - rounded[:, i] * steps[:, i]) / factor[i, i]
            left[:, i + 1 : stop] -= np.outer(errors[:, i - start], factor[i, i + 1 : stop])
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    result = np.empty_like(rounded)
    result[:, order] = rounded
    return result.astype(np.int32)


def _factor(hessian: np.ndarray, damping: float) -> np.ndarray:
    """The upper Cholesky factor U of the inverse, H^-1 = U^T U."""
    damped = hessian.astype(np.float64)
    diagonal = np.diag(damped).copy()
    dead = diagonal <= 0
    live_mean = diagonal[~dead].mean() if not dead.all() else 1.0
    damped[dead, dead] = live_mean
    damped[np.diag_indices_from(damped)] += damping * live_mean
    # With J reversing rows and columns, J H J = L L^T gives H^-1 = U^T U for U = J L^-1 J.
    return np.asarray(_inverse(np.linalg.cholesky(damped[::-1, ::-1]))[::-1, ::-1], np.float32)


def _inverse(lower: np.ndarray) -> np.ndarray:
    """The inverse of a lower triangular matrix, in a third of the time of a general one."""
    if len(lower) <= BLOCK:
        return np.linalg.inv(lower)
    half = len(lower) // 2
    result = np.zeros_like(lower)
    result[:half, :half] = first = _inverse(lower[:half, :half])
    result[half:, half:] = second = _inverse(lower[half:, half:])
    result[half:, :half] = -second @ (lower[half:, :half] @ first)
    return result
