"""Joins embedding tables that are read side by side to one, read at once, as in recommenders.

    Concat(Gather(T1, i1), Gather(T2, i2), ..)  ->  Gather([T1; T2; ..], [i1, i2, ..] + offsets)

One Gather from 26 tables takes less than 26 from one each, most where several threads share the work. The joined table
takes the place of the others, so that the weights grow by nothing but the offsets. Refused, with the reason: tables
that something else reads too, and more rows than the indices can count.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import ClassVar

from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..compiler.fusion.embeddings import Group, groups, join, why_not
from ..compiler.graph import Graph
from ..compiler.graph.editing import flattened
from ..compiler.graph.equality import excess, inputs_at_two_sizes
from ..compiler.graph.selection import label
from ..compiler.quantization.patch import Patcher
from ..errors import GraphError, TargetUnavailableError
from .base import Context, Pass, PassResult, Refusal


@dataclasses.dataclass(frozen=True)
class FuseEmbeddings(Pass):
    """Joins embedding tables of one width whose rows are concatenated, checked numerically.

    Attributes:
        least: how many tables make it worth it.
    """

    name: ClassVar[str] = "fuse-embeddings"
    least: int = 3

    def __post_init__(self) -> None:
        if self.least < 2:
            raise ValueError(f"least is at least 2, found {self.least}")

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Joins in place."""
        before = flattened(graph)
        run = _Run(before.clone(), self.least)
        run.join()
        if not run.tensors:
            return PassResult(modified=False, refusals=tuple(run.refusals.values()))
        reason = _difference(before, run, context)
        if reason:
            return PassResult(modified=False, refusals=(Refusal(reason), *run.refusals.values()))
        graph.model = run.graph.model
        weights = {"before": before.weight_bytes, "after": graph.weight_bytes}
        return PassResult(True, dict(run.changes), tuple(run.refusals.values()), {"weight_bytes": weights})


class _Run:
    """Joins what it can of a flat graph.

    Attributes:
        tensors: what the joined tables give, the same before and after.
        refusals: by group.
    """

    def __init__(self, graph: Graph, least: int) -> None:
        self.graph = graph
        self.changes: collections.Counter[str] = collections.Counter()
        self.refusals: dict[tuple[str, int], Refusal] = {}
        self.tensors: list[str] = []
        self._least = least
        self._patcher = Patcher(graph)

    def join(self) -> None:
        """Joins one group after the other: each replaces the Concat that the next may belong to."""
        while (group := self._next()) is not None:
            self.tensors.append(group.concat.outputs[0].name or "")
            self.changes.update({"tables joined": len(group.tables), "lookups joined": len(group.lookups)})
            join(self._patcher, group)
        RemoveUnusedNodesPass()(self.graph.model)

    def _next(self) -> Group | None:
        for group in groups(self.graph.model.graph):
            reason = why_not(group)
            if len(group.tables) < self._least:
                reason = f"{len(group.tables)} tables gain too little, {self._least} or more are joined"
            if not reason:
                return group
            self.refusals[(label(group.concat), group.start)] = Refusal(reason, label(group.concat))
        return None


def _difference(before: Graph, run: _Run, context: Context) -> str:
    """What the joined graph computes otherwise, as rows are only moved; empty where it is nothing."""
    try:
        errors = excess(before, run.graph, run.tensors, inputs_at_two_sizes(context), 0.0)
    except (GraphError, TargetUnavailableError) as error:
        return f"the result cannot be checked: {error}"
    wrong = (
        f"joined, tensor {name!r} changes: relative L2 {e:.2e}" for name, (e, differs) in errors.items() if differs
    )
    return next(wrong, "")
