"""SmoothQuant: moves the difficulty of activations with outlier channels into the weights that read them.

    x W  =  (x / s) (s W)        s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)

(Xiao et al. 2022, "SmoothQuant", equation 4.) All layers that read x share one s, from the maximum over their weights:
a query, key and value projection for instance. 1 / s is folded into what makes x, see `channels`; where x has other
uses too, such as a residual, or nothing takes the factor, one Mul is put before the layers, if asked for and if it
gains enough.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ...passes.base import Refusal
from ..graph import Graph
from ..graph.selection import label
from .channels import UnfoldableError, rank_of, source
from .layers import Layer, free_name, initializer, is_shared, layers, operand

if TYPE_CHECKING:
    from ..calibration import TensorStatistics

ALPHA = 0.8
"""How much moves where nobody chose."""

WORTH_DB = 6.0
"""What a Mul must gain: as much as one more bit for the activation. It costs time, and smaller gains are lost in the
error of the weights, which grows.
"""

_SMALLEST = 1e-5
"""Below this a range counts as dead, and its channel keeps its scale."""


def smooth(
    graph: Graph, statistics: Mapping[str, TensorStatistics], alpha: float, *, insert: bool = True
) -> tuple[dict[str, int], list[Refusal]]:
    """Smooths the inputs of the MatMul and Gemm layers of the main graph in place; shapes must be inferred.

    Args:
        statistics: of the inputs of these layers, with ranges of their channels.
        alpha: how much moves, from 0 (activations keep their ranges, weights become even) to 1 (the reverse).
        insert: whether to put in a Mul where the factor cannot be folded and it gains `WORTH_DB`.

    Returns counts by kind of change, and for each input left as it was, or that took a Mul, why.
    """
    changes: collections.Counter[str] = collections.Counter()
    refusals = []
    for value, readers in _readers(graph).items():
        scale = _scale(value, readers, statistics, alpha)
        if isinstance(scale, str):
            refusals.append(Refusal(scale, readers[0].name))
            continue
        if (reason := _fold(graph, value, readers, scale)) is None:
            changes["inputs smoothed"] += 1
        else:
            gain = _gain_db(statistics[value.name or ""], readers, scale)
            worth = insert and gain >= WORTH_DB
            what = "it takes a Mul: " if worth else f"a Mul would gain {gain:.1f} dB, too little: " if insert else ""
            refusals.append(Refusal(what + reason, readers[0].name))
            if not worth:
                continue
            _insert(graph, value, readers, scale)
            changes["inputs smoothed by a Mul"] += 1
        for reader in readers:
            reader.scale_inputs(scale)
    return dict(changes), refusals


def inputs(graph: Graph) -> list[str]:
    """Names of what may be smoothed: whose statistics `smooth` asks for."""
    return [value.name or "" for value in _readers(graph)]


def check_alpha(alpha: float | None) -> None:
    """Raises ValueError where an alpha that was given is none."""
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"smooth={alpha:g} is not between 0 and 1")


def is_convolutional(graph: Graph) -> bool:
    """Whether a graph has more convolutions than products.

    Its products are few and come last: smoothing them would gain little, and cost one more run over the data.
    """
    kinds = collections.Counter(layer.node.op_type == "Conv" for layer in layers(graph))
    return kinds[True] >= kinds[False]


def _readers(graph: Graph) -> dict[ir.Value, list[Layer]]:
    """The MatMul and Gemm layers, by what they read."""
    found: dict[ir.Value, list[Layer]] = {}
    for layer in layers(graph):
        if layer.node.op_type != "Conv":
            found.setdefault(operand(layer.node, 0), []).append(layer)
    return found


def _scale(
    value: ir.Value, readers: list[Layer], statistics: Mapping[str, TensorStatistics], alpha: float
) -> np.ndarray | str:
    """What to divide the channels by, 1 where either range is dead; or why that is not known."""
    if shared := [reader.name for reader in readers if is_shared(reader.weight)]:
        return f"the weights of {shared[0]!r} are shared"
    weights = np.max([reader.input_range() for reader in readers], axis=0)
    if not np.isfinite(weights).all():
        return f"weights that read {value.name!r} hold NaN or Inf"
    found = statistics.get(value.name or "")
    if value.shape is None or found is None or found.channel_low is None or found.channel_high is None:
        return f"the ranges of the channels of {value.name!r} are not known"
    if (found.channel_axis or 0) % len(value.shape) != len(value.shape) - 1:
        return f"the ranges of {value.name!r} are along another axis"
    activations = np.maximum(np.abs(found.channel_low), np.abs(found.channel_high))
    alive = (activations > _SMALLEST) & (weights > _SMALLEST)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale: np.ndarray = np.where(alive, activations**alpha / weights ** (1 - alpha), 1)
    return scale


def _gain_db(statistics: TensorStatistics, readers: list[Layer], scale: np.ndarray) -> float:
    """By how much less noise quantized inputs cause behind the layers: steps follow the range, weights carry them."""
    if statistics.channel_low is None or statistics.channel_high is None:
        raise ValueError("the ranges of the channels are not known")
    low, high = statistics.channel_low, statistics.channel_high
    power = sum(np.square(reader.load(), dtype=np.float64).sum(axis=0) for reader in readers)
    before = max(high.max(), 0) - min(low.min(), 0)
    after = max((high / scale).max(), 0) - min((low / scale).min(), 0)
    noise = [before**2 * np.sum(power), after**2 * np.sum(scale**2 * power)]
    return float(10 * np.log10(noise[0] / noise[1])) if min(noise) > 0 else 0.0


def _fold(graph: Graph, value: ir.Value, readers: list[Layer], scale: np.ndarray) -> str | None:
    """Divides the channels in what makes the value; where that cannot be, why."""
    nodes = [reader.node for reader in readers]
    if others := [use.node for use in value.uses() if use.node not in nodes]:
        return f"{value.name!r} is read by {others[0].op_type} {label(others[0])!r} too"
    try:
        source(value, rank_of(value) - 1).divide(graph, scale)
    except UnfoldableError as reason:
        return str(reason)
    return None


def _insert(graph: Graph, value: ir.Value, readers: list[Layer], scale: np.ndarray) -> None:
    factor = initializer(graph, f"{value.name}/smooth_factor", 1 / scale)
    node = ir.node("Mul", [value, factor], name=f"{value.name}/smooth")
    result = node.outputs[0]
    result.name, result.type, result.shape = free_name(graph, f"{value.name}/smoothed"), value.type, value.shape
    first = min((reader.node for reader in readers), key=list(graph.model.graph).index)
    graph.model.graph.insert_before(first, node)
    for reader in readers:
        reader.node.replace_input_with(0, result)
