"""Fuses what transformers are made of: attention, GELU, LayerNormalization, and the sums before these.

    Softmax(scale * q k^T + mask) v     ->  com.microsoft.MultiHeadAttention(q, k, v, mask), or Attention(x, weights)
    x / 2 * (1 + erf(x / sqrt(2)))      ->  Gelu, and by tanh FastGelu, by a sigmoid QuickGelu, after a bias BiasGelu
    d / sqrt(mean(d**2) + e) * g + b    ->  LayerNormalization, after a sum SkipLayerNormalization

What a scheme fuses is what its runtime computes faster so and does not find itself. ONNX Runtime's CPU fuses GELU by
itself, takes longer for SkipLayerNormalization than for the sum and the normalization, and gains nothing by Attention,
whose weights are not quantized. It is for a graph in float32, before that is lowered: in a quantized one rounding moves
values to other steps.

Every region is checked on a sample of the data, or on random inputs: where the tensor that it gives changes by more
than rounding, it stays as it was, and the refusal says by how much.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import ClassVar, Literal

from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..compiler.fusion.fuser import Fuser, Operators, Region
from ..compiler.graph import Graph
from ..compiler.graph.editing import flattened
from ..compiler.graph.equality import excess, inputs_at_two_sizes
from ..compiler.graph.probe import Arrays, run
from ..errors import GraphError, TargetUnavailableError
from .base import Context, Pass, PassResult, Refusal

TOLERANCE = 1e-4
"""Relative L2 by which a tensor may differ: sums in another order, and exponentials by another polynomial."""

SCHEMES: Mapping[str, Operators] = {
    "onnx": Operators(gelu="onnx"),
    "onnxruntime-cpu": Operators(attention="operands"),
    "onnxruntime-cuda": Operators(attention="weights", gelu="microsoft", bias_gelu=True, skip=True),
}


ROUNDS = 3
"""How often a single region is left out by itself; then all of its kind are."""


@dataclasses.dataclass(frozen=True)
class FuseTransformer(Pass):
    """Fuses attention, GELU and normalizations into single nodes, each checked numerically.

    Attributes:
        scheme: whose operators; onnx has those of ONNX itself alone, which every runtime takes.
    """

    name: ClassVar[str] = "fuse-transformer"
    scheme: Literal["onnx", "onnxruntime-cpu", "onnxruntime-cuda"] = "onnxruntime-cpu"

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Fuses in place; what the check refuses stays."""
        check = _Check(flattened(graph), SCHEMES[self.scheme], list(inputs_at_two_sizes(context)))
        while True:
            after, fuser = check.fused()
            refusals = (*check.refused.values(), *fuser.refusals)
            if not fuser.regions:
                return PassResult(modified=False, refusals=refusals)
            try:
                found = check.refuse(after, fuser)
            except (GraphError, TargetUnavailableError) as error:
                reason = Refusal(f"the result cannot be checked: {error}")
                return PassResult(modified=False, refusals=(reason, *refusals))
            if not found:
                break
        graph.model = after.model
        regions = [dataclasses.asdict(region) for region in fuser.regions]
        details = {"scheme": self.scheme, "regions": regions, "relative_l2": check.error}
        return PassResult(True, fuser.changes, refusals, details)


class _Check:
    """Compares a fused graph with the one before, and remembers what must stay.

    Attributes:
        refused: by the tensor that a region gives.
        error: the largest relative L2 of a tensor in the last comparison.
    """

    def __init__(self, before: Graph, operators: Operators, batches: Sequence[Arrays]) -> None:
        self.refused: dict[str, Refusal] = {}
        self.error = 0.0
        self._before = before
        self._operators = operators
        self._batches = batches
        self._rounds: Counter[str] = Counter()

    def fused(self, others: Collection[str] = ()) -> tuple[Graph, Fuser]:
        """A fused copy, without the regions that were refused, and without `others`."""
        after = self._before.clone()
        fuser = Fuser(after, self._operators, {*self.refused, *others})
        fuser.run()
        RemoveUnusedNodesPass()(after.model)
        return after, fuser

    def refuse(self, after: Graph, fuser: Fuser) -> bool:
        """Compares, and refuses what is wrong; returns whether anything was.

        Raises:
            GraphError, TargetUnavailableError: the graph before cannot be run.
        """
        names = [region.tensor for region in fuser.regions]
        try:
            errors = excess(self._before, after, names, self._batches, TOLERANCE)
        except GraphError as error:
            run(self._before, self._batches[0])  # raises where it is not the fused graph's fault
            self._refuse_kind(fuser, error)
            return True
        self.error = max(error for error, _ in errors.values())
        wrong = [name for name, (_, differs) in errors.items() if differs]
        if not wrong:
            return False
        self._refuse_first(fuser, {name: errors[name][0] for name in wrong})
        return True

    def _refuse_first(self, fuser: Fuser, errors: Mapping[str, float]) -> None:
        """Refuses the first region that is wrong, as those behind it read its result; all, where outputs alone are."""
        order = {output.name: place for place, node in enumerate(self._before.model.graph) for output in node.outputs}
        regions = sorted(fuser.regions, key=lambda region: order[region.tensor])
        first = next((region for region in regions if region.tensor in errors), None)
        if first is None:
            name, error = next(iter(errors.items()))
            self._refuse(regions, f"output {name!r} changes: {_numbers(error)}")
            return
        self._rounds[first.kind] += 1
        whole = self._rounds[first.kind] > ROUNDS
        alike = [region for region in regions if region is first or (whole and region.kind == first.kind)]
        self._refuse(alike, f"fused, tensor {first.tensor!r} changes: {_numbers(errors[first.tensor])}")

    def _refuse_kind(self, fuser: Fuser, error: GraphError) -> None:
        """Refuses the kinds of regions with which ONNX Runtime does not run the graph; all, where none is to blame."""
        reason = f"ONNX Runtime does not run it fused: {error.found}"
        tensors = {region.tensor: region.kind for region in fuser.regions}
        for kind in dict.fromkeys(tensors.values()):
            alone, _ = self.fused([tensor for tensor, other in tensors.items() if other != kind])
            try:
                for inputs in self._batches:
                    run(alone, inputs)
            except GraphError:
                self._refuse([region for region in fuser.regions if region.kind == kind], reason)
        if not self.refused.keys() & tensors.keys():
            self._refuse(fuser.regions, reason)

    def _refuse(self, regions: Iterable[Region], reason: str) -> None:
        for region in regions:
            self.refused[region.tensor] = Refusal(f"{region.kind} stays as it was: {reason}", region.node)


def _numbers(error: float) -> str:
    return f"relative L2 {error:.2e}, allowed {TOLERANCE:.0e}"
