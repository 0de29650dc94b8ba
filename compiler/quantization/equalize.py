"""Cross-layer equalization: evens out the ranges of channels between two layers without changing the function.

    W2 f(W1 x + b1)  =  (W2 S) f(S^-1 W1 x + S^-1 b1)        f(s x) = s f(x) for s > 0

With r1 and r2 the ranges of W1's rows and of W2's columns, s = sqrt(r1 / r2) makes both sqrt(r1 r2) (Nagel et al. 2019,
"Data-Free Quantization through Weight Equalization and Bias Correction", equation 11). `channels` has what may stand
between the two layers.

What it mends is a net whose channels differ widely in range, depthwise ones above all: one scale for an activation
leaves few steps to its small channels, and one scale for a weight to its small rows. Where ranges are even it changes
little.
"""

from __future__ import annotations

import numpy as np

from ...passes.base import Refusal
from ..graph import Graph
from .channels import Source, UnfoldableError, rank_of, source
from .layers import Layer, is_shared, layers, operand

ROUNDS = 50
TOLERANCE = 1e-3
"""Largest change of a scale, relative, at which the rounds end."""

_Pair = tuple[Source, Layer]


def equalize(graph: Graph) -> tuple[dict[str, int], list[Refusal]]:
    """Equalizes every pair of layers of the main graph in place; shapes must be inferred.

    Returns counts by kind of change, and for each layer that follows none it could be paired with, why.
    """
    found = [(_source(layer), layer) for layer in layers(graph)]
    pairs = [(before, after) for before, after in found if not isinstance(before, Refusal)]
    for _ in range(ROUNDS):
        moved = [_equalize(graph, *pair) for pair in pairs]
        if max(moved, default=0.0) < TOLERANCE:
            break
    refusals = [before for before, _ in found if isinstance(before, Refusal)]
    return ({"layers equalized": len(pairs)} if pairs else {}), refusals


def _source(layer: Layer) -> Source | Refusal:
    """Where the channels that a layer reads come from, or why that is of no use."""
    try:
        value = operand(layer.node, 0)
        if is_shared(value):
            raise UnfoldableError(f"{value.name!r} has other uses")
        if is_shared(layer.weight):
            raise UnfoldableError("its weights are shared")
        found = source(value, layer.channel_axis(rank_of(value)))
        if found.layer is None:
            raise UnfoldableError(f"the channels of {value.name!r} come from no layer")
    except UnfoldableError as reason:
        return Refusal(str(reason), layer.name)
    return found


def _equalize(graph: Graph, before: Source, after: Layer) -> float:
    """Equalizes a pair once and returns how far the scales were from 1."""
    if before.layer is None:
        return 0.0
    given, taken = before.layer.output_range(), after.input_range()
    alive = (given > 0) & (taken > 0)
    scale = np.sqrt(np.where(alive, given, 1) / np.where(alive, taken, 1))
    before.divide(graph, scale)
    after.scale_inputs(scale)
    return float(np.abs(scale - 1).max())
