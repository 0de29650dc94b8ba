"""Casts a float32 graph to float16 or bfloat16: weights, activations, constants and the operators that name a dtype.

    float32 inputs -> Cast -> float16 nodes -> Cast -> float32 outputs        with keep_io
    float16 inputs         -> float16 nodes ->         float16 outputs        without

Functions are inlined first. Some nodes stay in float32, with casts around them: those that the user names, and those
that lose their meaning; `compiler.graph.float16` has the rules. Masks do not: where a very negative constant leads to
Softmax alone, it is clamped into the range of the smaller type.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from onnx_ir.passes.common import LiftConstantsToInitializersPass

from ..compiler.graph import Graph
from ..compiler.graph.editing import inline
from ..compiler.graph.float16 import clamp_masks, judge
from ..compiler.graph.formats import FORMATS
from ..compiler.graph.precision import Lowering, keep, kept
from ..compiler.graph.selection import label, select
from .base import Context, Pass, PassResult, Refusal


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A graph in float32 whose nodes that must stay so are marked, and what the rules have found."""

    graph: Graph
    masks: int
    unchecked: tuple[Refusal, ...]


@dataclasses.dataclass(frozen=True)
class Cast(Pass):
    """Casts to the smaller type what keeps its meaning there; the rest stays in float32, each node with its reason.

    Attributes:
        keep_io: leave the model's inputs and outputs in float32. Arrays hold no bfloat16, so that to=bf16 needs it.
        keep: names or globs of nodes that stay in float32.
    """

    name: ClassVar[str] = "cast"
    to: Literal["fp16", "bf16"] = "fp16"
    keep_io: bool = True
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.to == "bf16" and not self.keep_io:
            raise ValueError("keep_io=false would give inputs of bfloat16, which arrays cannot hold")

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Casts in place. Nodes kept in float32 are marked, so that they stay so when the pass runs again."""
        prepared = self.prepare(graph, context)
        work = prepared.graph
        lowering = self.lowering(work)
        if lowering.pending():
            lowering.apply()
        refusals = prepared.unchecked + refused(work)
        if not lowering.lowered and not graph.model.functions:
            return PassResult(modified=False, refusals=refusals)
        graph.model = work.model
        changes = {"nodes lowered": lowering.lowered, "casts inserted": lowering.casts, "masks clamped": prepared.masks}
        return PassResult(modified=True, changes=changes, refusals=refusals)

    def lowering(self, graph: Graph) -> Lowering:
        """What becomes of a graph without functions."""
        return Lowering(graph, FORMATS[self.to].dtype, keep_io=self.keep_io)

    def prepare(self, graph: Graph, context: Context) -> Prepared:
        """A copy without functions, with masks clamped, where every node that must stay is marked.

        Raises:
            RecipeError: `keep` has a pattern that matches no node.
        """
        work = graph.clone()
        inline(work)
        work.infer()
        lowering, to = self.lowering(work), FORMATS[self.to]
        if not lowering.pending():
            return Prepared(work, 0, ())
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(work.model)
        masks = clamp_masks(work, to)
        asked = select(work, self.keep)
        for node in work.nodes():
            if (pattern := asked.get(label(node))) is not None:
                keep(node, f"kept by choice: {pattern!r}")
        unchecked = tuple(map(Refusal, judge(work, lowering, to, context.samples, context.calibration)))
        return Prepared(work, masks, unchecked)


def refused(graph: Graph) -> tuple[Refusal, ...]:
    """The nodes that stay in float32, and why."""
    stay = ((node, reason) for node in graph.nodes() if (reason := kept(node)))
    return tuple(Refusal(reason, label(node)) for node, reason in stay)
