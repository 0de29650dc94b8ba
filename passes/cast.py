"""Casts a float32 graph to float16: weights, activations, constants and the operators that name a dtype.

    float32 inputs -> Cast -> float16 nodes -> Cast -> float32 outputs        with keep_io
    float16 inputs         -> float16 nodes ->         float16 outputs        without

Functions are inlined first. Some nodes stay in float32, with casts around them; `compiler.float16` has the rules. Masks
do not: where a very negative constant leads to Softmax alone, it is clamped into the range of float16.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

from ..compiler.graph import Graph
from ..compiler.graph.float16 import clamp_masks, judge
from ..compiler.graph.precision import Lowering, kept
from .base import Context, Pass, PassResult, Refusal


@dataclasses.dataclass(frozen=True)
class Cast(Pass):
    """Casts to float16 what keeps its meaning there; the rest stays in float32, each node with its reason.

    Attributes:
        keep_io: leave the model's inputs and outputs in float32.
    """

    name: ClassVar[str] = "cast"
    to: Literal["fp16"] = "fp16"
    keep_io: bool = True

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Casts in place. Nodes kept in float32 are marked, so that they stay so when the pass runs again."""
        work = graph.clone()
        if work.model.functions:
            InlinePass()(work.model)
            work.model.functions.clear()
        work.infer()
        lowering = Lowering(work, ir.DataType.FLOAT16, keep_io=self.keep_io)
        unchecked: tuple[Refusal, ...] = ()
        masks = 0
        if lowering.pending():
            LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(work.model)
            masks = clamp_masks(work)
            unchecked = tuple(map(Refusal, judge(work, lowering, context.samples)))
            lowering.apply()
        stay = ((node, reason) for node in work.nodes() if (reason := kept(node)))
        refusals = unchecked + tuple(Refusal(reason, node.name or node.outputs[0].name or "") for node, reason in stay)
        if work.fingerprint() == graph.fingerprint():
            return PassResult(modified=False, refusals=refusals)
        graph.model = work.model
        changes = {"nodes lowered": lowering.lowered, "casts inserted": lowering.casts, "masks clamped": masks}
        return PassResult(modified=True, changes=changes, refusals=refusals)
