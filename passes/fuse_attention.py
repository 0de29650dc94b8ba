"""Fuses attention over the static caches of a decoder to com.microsoft's GroupQueryAttention.

    present k, v = Scatter(past k, v; positions; new k, v)
    Softmax(scale * q k^T + causal mask + bias) v
    ->  result, present k, v = GroupQueryAttention(q, new k, new v, past k, past v, ..., bias)

The node reads as much of a cache as is filled, where the graph's own products read all of it, and writes new tokens in
place where past and present share a buffer. Heads may share keys, and each may have a bias, as ALiBi gives it. What it
refuses: keys that are computed from a compressed cache, keys and values of different widths, masks that are not causal,
and all that is no decoder.

Rotary embedding goes into the node, with the cosines and sines of all positions as constants, which the graph's own
nodes compute whatever the scaling of angles; pairs of channels may be halves or interleaved. Where the operator does
not take it, a node RotaryEmbedding stands before it: of heads that are no multiple of 16 wide, of fewer turned channels
than a multiple of 16, and where tokens are dropped from caches, so that their place is not their position. Angles that
something else than a token's position decides stay as they are.

Queries, keys and values that are products of one tensor become one product, which weights of few bits gain by most.

Each attention is checked on a sample of the data, or on random inputs: where its result changes by more than rounding,
it stays as it was, and the refusal says by how much.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from ..compiler.fusion.cached import CachedFuser
from ..compiler.fusion.check import Check
from ..compiler.fusion.reach import Kind
from ..compiler.fusion.views import drop_undone
from ..compiler.graph import Graph
from ..compiler.graph.editing import flattened
from ..compiler.graph.equality import inputs_at_two_sizes
from .base import Context, Pass, PassResult, Refusal

REACH: Mapping[str, Kind] = {"onnxruntime-cpu": "filled", "onnxruntime-cuda": "room"}


@dataclasses.dataclass(frozen=True)
class FuseAttention(Pass):
    """Fuses attention over the caches of a decoder into single nodes of ONNX Runtime, each checked numerically.

    Attributes:
        scheme: for whom; onnxruntime-cuda leaves nothing to the host, so that a CUDA graph can hold the call.
    """

    name: ClassVar[str] = "fuse-attention"
    scheme: Literal["onnxruntime-cpu", "onnxruntime-cuda"] = "onnxruntime-cpu"

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Fuses in place; what the check refuses stays."""
        states = context.signature.states
        if not states:
            return PassResult(modified=False, refusals=(Refusal("the model has no caches to attend over"),))
        check = Check(
            flattened(graph),
            lambda work, left_out: CachedFuser(work, states, left_out, context.signature.positions, REACH[self.scheme]),
            list(inputs_at_two_sizes(context)),
        )
        result = check.apply(graph, {"scheme": self.scheme})
        if result.modified:
            drop_undone(graph)
        return result
