"""Cuts a graph into stages of a pipeline, and marks each node with its stage; operators and tensors stay.

    n0 n1 ... n(L-1)        the nodes that depend on the inputs, in the order of the graph
    stage 0 | stage 1 | ... cut at positions p1 < p2 < ..., so that every tensor passes forward only

    bytes(p)                of what is made before p, or given, and read behind it; outputs of the model pass to the end
    time(q, p)              of the nodes q..p-1: of a stage by itself, where it was built; else as the runtime's
                            profiler tells, or a roofline
    memory(q, p)            of the weights that they read, each once, and of the activations that live at one moment

    choose p1 < p2 < ...    with the fewest bytes, among the cuts whose slowest stage is at most (1 + slack) times the
                            best one's, and whose stages each fit in the memory; build and time the stages, and choose
                            again by what was found, until they take the same time

Constants, and what is computed from constants or from shapes alone, belong to no stage: each stage has its own copy.
An axis may be dynamic across a cut. Refused: cuts inside of branches and loop bodies, which stay whole; cuts at tensors
that arrays cannot hold, or whose size is known only when they are computed; more stages than places to cut at. What the
runtime fuses to one kernel is cut only where there are no other places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..compiler.graph import Graph
from ..compiler.graph.cost import at_sizes
from ..compiler.partition.balance import balanced, measure_on
from ..compiler.partition.cost import Times, estimated, measured
from ..compiler.partition.cut import Limits, Piece, choose
from ..compiler.partition.line import Line, line_of
from ..compiler.partition.split import mark_pieces, marked
from ..errors import EngineError, GraphError, RecipeError
from .base import Context, Pass, PassResult, Refusal

if TYPE_CHECKING:
    from ..compiler.signature import Signature
    from ..targets.base import Target

LINK_GB_S = 40.0
"""What passes between two GPUs of one host in a second over PCIe; more over NVLink."""

Place = tuple["Target", str, "Signature", Mapping[str, np.ndarray]]
"""Where nodes and stages are measured: a target, a precision, and the model's inputs with a sample of them."""


@dataclasses.dataclass(frozen=True)
class Partition(Pass):
    """Marks nodes with stages 0, 1, ... of a pipeline. A graph that is marked with as many stages already stays.

    Attributes:
        stages: how many.
        on: target that runs the stages, its options joined by ``+``: its profiler measures the nodes. Empty for
            estimates that need no machine.
        precision: of the engine that is measured.
        memory_mib: most that the weights and activations of a stage may take; None for no limit.
        slack: share by which the slowest stage may be slower than the best cut's where fewer bytes pass.
        rounds: how many cuts are built and timed at most, where `on` names a target; 0 for none.
    """

    name: ClassVar[str] = "partition"
    stages: int = 2
    on: str = ""
    precision: str = "fp32"
    memory_mib: int | None = None
    slack: float = 0.05
    rounds: int = 4

    def __post_init__(self) -> None:
        if self.stages < 2:
            raise RecipeError("a pipeline has too few stages", expected="2 or more", found=self.stages)
        if not 0 <= self.slack < 1:
            raise RecipeError("slack of partition is no share", expected="0 or more, below 1", found=self.slack)
        if self.rounds < 0:
            raise RecipeError("partition has too few rounds", expected="0 or more", found=self.rounds)

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Marks in place.

        Raises:
            GraphError: the graph cannot be cut so.
        """
        if marked(graph) == self.stages:
            return PassResult(modified=False)
        place = self._place(context)
        times = estimated(graph, context.signature) if place is None else measured(graph, *place)
        line = line_of(graph, at_sizes(graph, context.signature.sizes()), times.shapes)
        if not len(line):
            raise GraphError("the graph cannot be cut: no node depends on its inputs")
        on_gpu = place is not None and "cpu" not in place[0].capabilities.devices
        limits = Limits(
            memory_bytes=None if self.memory_mib is None else self.memory_mib << 20,
            slack=self.slack,
            link_bytes_ms=LINK_GB_S * 1e6 if on_gpu else None,
            avoided=times.fused(line.labels),
        )
        pieces, cuts, refusals = self._chosen(graph, line, times, limits, place)
        mark_pieces(graph, pieces)
        refusals += [Refusal("a node with branches or a body is not cut inside", name) for name in line.whole]
        changes = {"stages": self.stages, "bytes that pass": sum(piece.sent_bytes for piece in pieces)}
        return PassResult(True, changes, tuple(refusals), _details(line, pieces, times, cuts))

    def _chosen(
        self, graph: Graph, line: Line, times: Times, limits: Limits, place: Place | None
    ) -> tuple[list[Piece], int, list[Refusal]]:
        """The stages, how many cuts were built and timed, and what could not be measured."""
        refusals = [Refusal(f"the nodes' times are estimates: {times.lacking}")] if times.lacking else []
        known = times.along(line.labels)
        if place is not None and self.rounds and _runs(place[0]):
            measure = measure_on(graph, *place)
            try:
                return *balanced(line, known, self.stages, limits, measure, self.rounds), refusals
            except EngineError as error:
                refusals.append(Refusal(f"no stages were built and timed: {error.message}"))
        return choose(line, known, self.stages, limits), 0, refusals

    def _place(self, context: Context) -> Place | None:
        """Where to measure; None for nowhere."""
        if not self.on:
            return None
        from ..compiler.data import random_batch, resized
        from ..targets.stages.inner import parse_inner

        signature = context.signature
        first = next(iter(context.samples), None) if context.samples is not None else None
        sample = first or random_batch(signature, np.random.default_rng(0))
        return parse_inner(self.on), self.precision, signature, resized(signature, sample, signature.sizes())


def _runs(target: Target) -> bool:
    state = target.availability()
    return state.build and state.run


def _details(line: Line, pieces: Sequence[Piece], times: Times, cuts: int) -> dict[str, object]:
    rows = [
        {
            "stage": number,
            "nodes": piece.nodes[1] - piece.nodes[0],
            "from": line.labels[piece.nodes[0]],
            "ms": piece.ms,
            "memory_bytes": piece.memory_bytes,
            "sent_bytes": piece.sent_bytes,
            "sent": list(piece.sent),
        }
        for number, piece in enumerate(pieces)
    ]
    return {"times": times.how, "cuts_timed": cuts, "stages": rows}
