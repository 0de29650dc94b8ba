"""Moves cuts until the stages take the same time: builds the stages of a cut, times them, and cuts again.

    t(n)        of node n, as it is known so far
    m(s)        of stage s, built and timed by itself
    t(n)       <- t(n) m(s) / sum of t over s, for all nodes n of stage s

Profilers misjudge whole kinds of layers, as those that are shorter than a launch, and a stage by itself may get other
kernels than as a part of the whole; what is timed here is what will run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ...targets.base import Target
from ..graph import Graph
from ..signature import Signature
from .cost import engine, timed
from .cut import Limits, Piece, choose
from .line import Line
from .split import mark_pieces, split

EVEN = 0.04
"""Share by which the slowest stage may be slower than the mean: less than repeated timings differ by."""

Measure = Callable[[Sequence[Piece]], Sequence[float]]


def balanced(
    line: Line, times_ms: Sequence[float], stages: int, limits: Limits, measure: Measure, rounds: int
) -> tuple[list[Piece], int]:
    """The cut whose slowest stage was the fastest of those that were timed, and how many were.

    Each of its pieces has the time that was found.

    Args:
        times_ms: of each node, to begin with.
        measure: milliseconds of each stage of a cut.
        rounds: how many cuts are timed at most.

    Raises:
        GraphError: there are not so many places to cut at, or the stages do not fit.
    """
    times = np.asarray(times_ms, float)
    found: dict[tuple[tuple[int, int], ...], list[Piece]] = {}
    for _ in range(rounds):
        pieces = choose(line, times.tolist(), stages, limits)
        cut = tuple(piece.nodes for piece in pieces)
        if cut in found:
            break
        taken = measure(pieces)
        found[cut] = [dataclasses.replace(piece, ms=ms) for piece, ms in zip(pieces, taken, strict=True)]
        if max(taken) <= (1 + EVEN) * sum(taken) / stages:
            break
        for (first, end), ms in zip(cut, taken, strict=True):
            known = times[first:end].sum()
            times[first:end] = times[first:end] * (ms / known) if known else ms / (end - first)
    return min(found.values(), key=lambda pieces: max(piece.ms for piece in pieces)), len(found)


def measure_on(
    graph: Graph, target: Target, precision: str, signature: Signature, sample: Mapping[str, np.ndarray]
) -> Measure:
    """Builds the stages of a cut on a target, one after the other, on what those before give for the sample.

    The measure raises EnginesmithError where a stage cannot be built or run.
    """

    def measure(pieces: Sequence[Piece]) -> list[float]:
        cut = graph.clone()
        mark_pieces(cut, pieces)
        values, found = dict(sample), []
        for stage in split(cut, signature):
            inputs = {spec.name: np.asarray(values[spec.name]) for spec in stage.signature.inputs}
            with engine(stage.graph, target, precision, stage.signature, inputs) as (folder, info):
                ms, outputs = timed(target, folder, info, inputs)
            found.append(ms)
            values |= outputs
        return found

    return measure
