"""One graph on its way: what may shrink, how much of it, and what that does to the outputs."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir

from ...errors import RecipeError
from ...passes.base import Context, Refusal
from ..budget import Budget
from ..dimensions import Dim, Dimensions, Group
from ..dimensions.layout import Product, Term, resolved
from ..dimensions.resize import resize
from ..graph import Graph
from ..graph.cost import costs
from ..graph.editing import flattened
from ..graph.selection import label
from ..quantization.layers import as_layer
from ..sensitivity import Evaluation
from .allocation import Candidate, Scope, by_ratio, to_cost, to_share
from .cost import CostModel, Macs
from .importance import Importance, Ranking, by_gradients, by_moments, by_weights
from .ratios import matching, ratios_of
from .readers import with_moments
from .refit import refit

if TYPE_CHECKING:
    from ..calibration import Calibration

BATCHES = 4
"""Batches of data that sensitivities and the error of the whole are measured on."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """How much is to go."""

    kind: Literal["ratio", "macs", "latency"]
    value: float
    scope: Scope = "local"
    ratios: tuple[str, ...] = ()


class Pruning:
    """Prunes a flat copy of a graph.

    Args:
        graph: stays as it is.
        importance: how positions are ranked.
        multiple: what sizes should be multiples of.
        keep: names or globs of dimensions that stay.

    Attributes:
        graph: the copy.
        refusals: dimensions that do not shrink, and layers that were not fitted, with reasons.
        changes: counts for people.

    Raises:
        RecipeError: `keep` matches nothing; the importance needs what the context has not.
    """

    def __init__(
        self, graph: Graph, context: Context, importance: Importance, *, multiple: int, keep: Sequence[str]
    ) -> None:
        self.graph = flattened(graph)
        self.changes: collections.Counter[str] = collections.Counter()
        self._whole = self.graph.clone()
        self._context = context
        self._importance = importance
        self._table = costs(self.graph, context.signature.sizes())
        self._dimensions = Dimensions(self.graph)
        self._refusals: list[Refusal] = []
        self._candidates = self._find(multiple, keep)

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Why what is left alone is left alone."""
        return tuple(self._refusals)

    def _find(self, multiple: int, keep: Sequence[str]) -> list[Candidate]:
        """The dimensions that may shrink, ranked."""
        groups = [group for group in self._dimensions.groups if group.of("writes")]
        free = {group.dim: group for group in groups if not self._why_not(group)}
        chosen: list[tuple[Group, int]] = []
        for group in groups:
            step = multiple // math.gcd(multiple, inner_size(group))
            if reason := self._why_not(group):
                self._refusals.append(Refusal(reason, group.name))
            elif outer := [free[dim] for dim in group.parents if dim in free]:
                self._refusals.append(Refusal(f"it is a part of {outer[0].name}, of which whole ones go", group.name))
            elif group.size <= step:
                self._refusals.append(Refusal(f"its {group.size} positions are not more than {step}", group.name))
            else:
                chosen.append((group, step))
        kept = {name for pattern in keep for name in matching([group.name for group, _ in chosen], pattern)}
        self._refusals += [Refusal("kept by choice", group.name) for group, _ in chosen if group.name in kept]
        steps = {group.name: step for group, step in chosen if group.name not in kept}
        left = [group for group, _ in chosen if group.name in steps]
        return [
            Candidate(group, ranking, steps[group.name], steps[group.name])
            for group, ranking in self._rank(left, steps)
        ]

    def _why_not(self, group: Group) -> str:
        return group.why_not("shrink")

    def _rank(self, groups: Sequence[Group], steps: Mapping[str, int]) -> list[tuple[Group, Ranking]]:
        if self._importance in ("l1", "l2"):
            return [(group, by_weights(group, self._importance)) for group in groups]
        if self._importance == "taylor":
            return self._by_taylor(groups)
        ranked = {}
        unread = [group for group in groups if not group.of("reads")]
        for group in unread:  # what is read by other activations only
            ranked[group.name] = by_weights(group, "l2")
        samples = self._calibration().limited()
        for number, (group, own) in enumerate(
            with_moments(self.graph, [g for g in groups if g not in unread], samples)
        ):
            self._context.progress(0.4 * number / len(groups), f"ranking {group.name}")
            ranked[group.name] = by_moments(group, own, self._importance, step=steps[group.name])
        return [(group, ranked[group.name]) for group in groups]

    def _by_taylor(self, groups: Sequence[Group]) -> list[tuple[Group, Ranking]]:
        if self._context.gradients is None:
            raise RecipeError(
                "importance=taylor needs gradients, and there is no torch module to take them from",
                expected="a model from file.py:factory or a torch module, with data",
                hint="choose importance=obs",
            )
        gradients = self._context.gradients()
        found = []
        for group in groups:
            ranking = by_gradients(group, gradients)
            if isinstance(ranking, str):
                self._refusals.append(Refusal(f"not pruned by gradients: {ranking}", group.name))
            else:
                found.append((group, ranking))
        return found

    def _calibration(self) -> Calibration:
        return self._context.require_calibration("prune", "to see what its layers read")

    def allocate(self, goal: Goal) -> dict[Dim, int]:
        """The sizes of the dimensions that shrink; empty where none does.

        Raises:
            RecipeError: a glob of `goal.ratios` matches nothing; latency is the goal, and nothing can be timed.
        """
        names = [candidate.group.name for candidate in self._candidates]
        macs = Macs(self._dimensions, self._table)
        if goal.kind == "ratio" and goal.scope == "local":
            sizes = by_ratio(self._candidates, ratios_of(names, goal.value, goal.ratios))
        elif goal.kind == "ratio":
            sizes = to_share(self._candidates, 1 - goal.value)
        else:
            model: CostModel = macs if goal.kind == "macs" else self._latency(macs)
            sizes = to_cost(self._candidates, model, goal.value * model.total({}))
            if (reached := model.total(sizes) / model.total({})) > goal.value:
                what = f"{goal.kind} falls to {reached:.3g} of what it was, {goal.value:g} was asked for"
                self._refusals.append(Refusal(f"{what}: no dimension that is left can shrink further"))
        self._macs = macs
        return {dim: size for dim, size in sizes.items() if size < dim.size}

    def _latency(self, macs: Macs) -> CostModel:
        raise NotImplementedError

    def prune(self, sizes: Mapping[Dim, int], *, refit: bool, sensitivity: bool) -> dict[str, Any]:
        """Prunes the graph to these sizes; returns the details of the result."""
        kept = {c.group.dim: c.ranking.kept(sizes[c.group.dim]) for c in self._candidates if c.group.dim in sizes}
        rows = [self._row(candidate, sizes) for candidate in self._candidates if candidate.group.dim in sizes]
        before, after = self._macs.total({}), self._macs.total(sizes)
        evaluation = self._evaluation()
        if evaluation is not None and sensitivity:
            self._measure_alone(rows, kept, evaluation)
        fits = self._apply(self.graph, self._dimensions, kept, fit=refit, report=True)
        self.changes["dimensions pruned"] = len(rows)
        self.changes["positions removed"] = sum(row["before"] - row["after"] for row in rows)
        error = None if evaluation is None else evaluation.measure(self.graph).error
        return {
            "prune": rows,
            "importance": self._importance,
            "macs": {"before": before, "after": after},
            "parameters": {"before": self._whole.weight_bytes // 4, "after": self.graph.weight_bytes // 4},
            "error": error,
            "fits": [fit.record() for fit in fits],
        }

    def _row(self, candidate: Candidate, sizes: Mapping[Dim, int]) -> dict[str, Any]:
        dim = candidate.group.dim
        size = sizes[dim]
        return {
            "group": candidate.group.name,
            "before": dim.size,
            "after": size,
            "loss": candidate.loss(size),
            "macs": 1 - self._macs.total({dim: size}) / max(self._macs.total({}), 1.0),
        }

    def _evaluation(self) -> Evaluation | None:
        samples = self._context.samples
        if samples is None and self._context.calibration is not None:
            samples = self._context.calibration.samples
        return (
            None if samples is None else Evaluation(self._whole, samples, Budget("relative_l2", 1.0), batches=BATCHES)
        )

    def _measure_alone(
        self, rows: Sequence[dict[str, Any]], kept: Mapping[Dim, np.ndarray], evaluation: Evaluation
    ) -> None:
        """Notes the error of each dimension when it alone is pruned, nothing fitted."""
        for number, (row, (dim, positions)) in enumerate(zip(rows, kept.items(), strict=True)):
            self._context.progress(0.4 + 0.2 * number / len(rows), f"alone: {row['group']}")
            graph = self._whole.clone()
            dimensions = Dimensions(graph)
            same = next(g.dim for g in dimensions.groups if g.name == self._dimensions.group(dim).name)
            resize(dimensions, {same: positions})
            row["alone"] = evaluation.measure(graph).error

    def _apply(
        self, graph: Graph, dimensions: Dimensions, kept: Mapping[Dim, np.ndarray], *, fit: bool, report: bool
    ) -> list[Any]:
        taken = resize(dimensions, kept)
        if not fit:
            return []
        outputs = {label(m.node): places for m, places in taken.items() if m.role == "writes" and m.node is not None}
        layers: dict[str, np.ndarray] = {}
        changed = _reached(m.value for dim in kept for m in dimensions.group(dim).of("carries"))
        for node in graph.model.graph:
            layer = as_layer(node)
            if layer is not None and node.inputs[0] in changed:
                layers[label(node)] = outputs.get(label(node), np.arange(layer.load().shape[0]))
        progress: Callable[[float], None] = lambda done: self._context.progress(0.6 + 0.4 * done, "fitting")  # noqa: E731
        fits, refusals = refit(self._whole, graph, layers, self._calibration().limited(), progress=progress)
        if report:
            self._refusals += refusals
        return fits


def _reached(values: Iterable[ir.Value]) -> set[ir.Value]:
    """All values that depend on these, and these."""
    found = set(values)
    pending = list(found)
    while pending:
        for node in pending.pop().consumers():
            new = [value for value in node.outputs if value not in found]
            found.update(new)
            pending.extend(new)
    return found


def inner_size(group: Group) -> int:
    """How many positions of an axis a position of the group always takes together: a head of 64 takes 64."""
    return math.gcd(*(_inner(member.term, group.dim) for member in group.members)) or 1


def _inner(term: Term, dim: Dim) -> int:
    """Positions that lie together for each of the dimension's; 0 where it is not in the term."""
    found = resolved(term)
    if isinstance(found, Dim):
        return int(found is dim)
    sizes = [_inner(part, dim) for part in found.parts]
    if not isinstance(found, Product):
        return math.gcd(*sizes)
    place = next((place for place, size in enumerate(sizes) if size), None)
    return 0 if place is None else sizes[place] * math.prod(part.size for part in found.parts[place + 1 :])
