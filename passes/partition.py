"""Cuts a graph into stages of a pipeline, and marks each node with its stage; operators and tensors stay.

    n0 n1 ... n(L-1)        the nodes that depend on the inputs, in the order of the graph
    stage 0 | stage 1 | ... cut at positions p1 < p2 < ..., so that every tensor passes forward only

    bytes(p)                of what is made before p, or given, and read behind it; outputs of the model pass to the end
    time(q, p)              of the nodes q..p-1, measured where the target's runtime tells, else by a roofline
    memory(q, p)            of the weights that they read, each once, and of the activations that live at one moment

    choose p1 < p2 < ...    with the fewest bytes, among the cuts whose slowest stage is at most (1 + slack) times the
                            best one's, and whose stages each fit in the memory

Constants, and what is computed from constants or from shapes alone, belong to no stage: each stage has its own copy.
An axis may be dynamic across a cut. Refused: cuts inside of branches and loop bodies, which stay whole; cuts at tensors
that arrays cannot hold, or whose size is known only when they are computed; more stages than places to cut at. What the
runtime fuses to one kernel is cut only where there are no other places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ..compiler.graph import Graph
from ..compiler.graph.cost import at_sizes
from ..compiler.partition.cost import Times, estimated, measured
from ..compiler.partition.cut import Limits, Piece, choose
from ..compiler.partition.line import Line, line_of, varying
from ..compiler.partition.split import mark, marked
from ..errors import GraphError, RecipeError
from .base import Context, Pass, PassResult, Refusal

LINK_GB_S = 40.0
"""What passes between two GPUs of one host in a second over PCIe; more over NVLink."""


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
    """

    name: ClassVar[str] = "partition"
    stages: int = 2
    on: str = ""
    precision: str = "fp32"
    memory_mib: int | None = None
    slack: float = 0.05

    def __post_init__(self) -> None:
        if self.stages < 2:
            raise RecipeError("a pipeline has too few stages", expected="2 or more", found=self.stages)
        if not 0 <= self.slack < 1:
            raise RecipeError("slack of partition is no share", expected="0 or more, below 1", found=self.slack)

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Marks in place.

        Raises:
            GraphError: the graph cannot be cut so.
        """
        if marked(graph) == self.stages:
            return PassResult(modified=False)
        times, on_gpu = self._times(graph, context)
        line = line_of(graph, at_sizes(graph, context.signature.sizes()), times.shapes)
        if not len(line):
            raise GraphError("the graph cannot be cut: no node depends on its inputs")
        limits = Limits(
            memory_bytes=None if self.memory_mib is None else self.memory_mib << 20,
            slack=self.slack,
            link_bytes_ms=LINK_GB_S * 1e6 if on_gpu else None,
            avoided=times.fused(line.labels),
        )
        pieces = choose(line, times.along(line.labels), self.stages, limits)
        nodes = list(varying(graph))
        for number, piece in enumerate(pieces):
            for node in nodes[slice(*piece.nodes)]:
                mark(node, number)
        refusals = [Refusal("a node with branches or a body is not cut inside", name) for name in line.whole]
        if times.lacking:
            refusals.append(Refusal(f"the nodes' times are estimates: {times.lacking}"))
        changes = {"stages": self.stages, "bytes that pass": sum(piece.sent_bytes for piece in pieces)}
        return PassResult(True, changes, tuple(refusals), _details(line, pieces, times))

    def _times(self, graph: Graph, context: Context) -> tuple[Times, bool]:
        if not self.on:
            return estimated(graph, context.signature), False
        from ..compiler.data import random_batch, resized
        from ..targets.stages.inner import parse_inner

        target, signature = parse_inner(self.on), context.signature
        first = next(iter(context.samples), None) if context.samples is not None else None
        sample = first or random_batch(signature, np.random.default_rng(0))
        sample = resized(signature, sample, signature.sizes())
        on_gpu = "cpu" not in target.capabilities.devices
        return measured(graph, target, self.precision, signature, sample), on_gpu


def _details(line: Line, pieces: Sequence[Piece], times: Times) -> dict[str, object]:
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
    return {"times": times.how, "stages": rows}
