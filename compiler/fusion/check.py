"""Compares a graph whose regions were fused with the one before, and takes back what computes something else."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from onnx_ir.passes.common import RemoveUnusedNodesPass

from ...errors import GraphError, TargetUnavailableError
from ...passes.base import PassResult, Refusal
from ..graph import Graph
from ..graph.equality import excess
from ..graph.probe import Arrays, run
from .fuser import Region

TOLERANCE = 1e-4
"""Relative L2 by which a tensor may differ: sums in another order, and exponentials by another polynomial."""

ROUNDS = 3
"""How often a single region is left out by itself; then all of its kind are."""


class Fusing(Protocol):
    """Rewrites a flat graph; see `Fuser`."""

    regions: list[Region]
    refusals: list[Refusal]

    @property
    def changes(self) -> dict[str, int]:
        """Regions by kind."""

    def run(self) -> None:
        """Fuses all that it can."""


Make = Callable[[Graph, Collection[str]], Fusing]
"""Makes the rewriter of a graph, given the tensors of regions that stay as they are."""


class Check:
    """Compares a fused graph with the one before, and remembers what must stay.

    Args:
        before: a flat graph; it stays as it is.

    Attributes:
        refused: by the tensor that a region gives.
        error: the largest relative L2 of a tensor in the last comparison.
    """

    def __init__(self, before: Graph, make: Make, batches: Sequence[Arrays]) -> None:
        self.refused: dict[str, Refusal] = {}
        self.error = 0.0
        self._before = before
        self._make = make
        self._batches = batches
        self._rounds: Counter[str] = Counter()

    def apply(self, graph: Graph, details: Mapping[str, Any]) -> PassResult:
        """Puts the fused graph in the place of `graph`, without the regions that are wrong."""
        while True:
            after, fuser = self.fused()
            refusals = (*self.refused.values(), *fuser.refusals)
            if not fuser.regions:
                return PassResult(modified=False, refusals=refusals)
            try:
                found = self.refuse(after, fuser)
            except (GraphError, TargetUnavailableError) as error:
                reason = Refusal(f"the result cannot be checked: {error}")
                return PassResult(modified=False, refusals=(reason, *refusals))
            if not found:
                break
        graph.model = after.model
        regions = [dataclasses.asdict(region) for region in fuser.regions]
        return PassResult(True, fuser.changes, refusals, {**details, "regions": regions, "relative_l2": self.error})

    def fused(self, others: Collection[str] = ()) -> tuple[Graph, Fusing]:
        """A fused copy, without the regions that were refused, and without `others`."""
        after = self._before.clone()
        fuser = self._make(after, {*self.refused, *others})
        fuser.run()
        RemoveUnusedNodesPass()(after.model)
        return after, fuser

    def refuse(self, after: Graph, fuser: Fusing) -> bool:
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

    def _refuse_first(self, fuser: Fusing, errors: Mapping[str, float]) -> None:
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

    def _refuse_kind(self, fuser: Fusing, error: GraphError) -> None:
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
