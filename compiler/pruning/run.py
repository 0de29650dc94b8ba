"""One graph on its way: how much of each dimension goes, what that does to the outputs, and the fit of what is left."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ...passes.base import Context, Refusal
from ..budget import Budget
from ..dimensions import Dim, Dimensions, Member
from ..dimensions.resize import resize
from ..graph import Graph
from ..graph.cost import costs
from ..graph.editing import flattened
from ..graph.selection import label
from ..quantization.layers import as_layer
from ..sensitivity import Evaluation
from ..sensitivity.evaluation import number
from .allocation import Candidate, by_ratio, to_cost, to_share
from .candidates import find
from .cost import Macs
from .goal import Goal
from .importance import Importance
from .latency import Latency
from .normalization import reestimate
from .ratios import ratios_of
from .refit import Fit, refit

BATCHES = 4
"""Batches of data that errors are measured on."""

FITTED = 16
"""Batches of data that a dimension is fitted on when it alone shrinks."""

_TRIED = 0.7
"""Part of its positions that a dimension keeps when it alone shrinks."""
_TRIES = 4
"""How many times sizes are chosen anew where the pruned graph takes longer than the table says."""


class Pruning:
    """Prunes a flat copy of a graph.

    Args:
        graph: stays as it is.
        importance: how positions are ranked.
        multiple: what lengths of axes should be multiples of.
        keep: names or globs of dimensions that stay.
        fits: whether the weights that are left are fitted.

    Attributes:
        graph: the copy.
        refusals: dimensions that do not shrink, and layers that were not fitted, with reasons.
        changes: counts for people.
        kept: what is left of constants.

    Raises:
        RecipeError: `keep` matches nothing; the importance needs what the context has not.
        GraphError: ONNX Runtime refuses the graph or the data.
    """

    def __init__(
        self, graph: Graph, context: Context, importance: Importance, *, multiple: int, keep: Sequence[str], fits: bool
    ) -> None:
        self.graph = flattened(graph)
        self.changes: collections.Counter[str] = collections.Counter()
        self.kept: dict[tuple[str, int], dict[int, np.ndarray]] = {}
        self._whole = self.graph.clone()
        self._context = context
        self._importance = importance
        self._fits = fits
        self._dimensions = Dimensions(self.graph)
        self._macs = Macs(self._dimensions, costs(self.graph, context.signature.sizes()))
        self._details: dict[str, Any] = {"importance": importance}
        self._candidates, self._refusals = find(self._dimensions, context, importance, multiple=multiple, keep=keep)
        samples = context.samples if context.calibration is None else context.calibration.samples
        bound = Budget("relative_l2", 1.0)
        self._evaluation = None if samples is None else Evaluation(self._whole, samples, bound, batches=BATCHES)

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Why what is left alone is left alone."""
        return tuple(self._refusals)

    def measure(self) -> None:
        """Measures the error that each dimension makes alone at about 70 % of its positions; nothing without data."""
        if self._evaluation is None:
            return
        measured = []
        for place, candidate in enumerate(self._candidates):
            self._context.progress(0.3 + 0.3 * place / len(self._candidates), f"alone: {candidate.group.name}")
            tried = min(candidate.nearest(candidate.group.size * _TRIED), candidate.sizes()[1])
            graph, dimensions = self._again()
            own = {label(m.node) for m in candidate.group.of("reads") if m.node is not None}
            self._shrink(graph, dimensions, self._kept({candidate.group.dim: tried}, dimensions), only=own)
            error = self._evaluation.measure(graph).error
            measured.append(dataclasses.replace(candidate, alone=error if np.isfinite(error) else None, tried=tried))
        self._candidates = measured
        rows = [{"group": c.group.name, "size": c.group.size, "tried": c.tried, "error": c.alone} for c in measured]
        self._details["sensitivity"] = sorted(rows, key=lambda row: -(row["error"] or 0.0))

    def allocate(self, goal: Goal, on: str) -> dict[Dim, int]:
        """The sizes of the dimensions that shrink; empty where none does.

        Args:
            on: target whose time is meant, where latency is the goal.

        Raises:
            RecipeError: a glob of `goal.ratios` matches nothing.
            TargetUnavailableError: latency is the goal, and its target does not run here.
        """
        names = [candidate.group.name for candidate in self._candidates]
        if not names:
            self._refusals.insert(0, Refusal("it has no dimension that can shrink"))
            return {}
        if goal.kind == "ratio" and goal.scope == "local":
            ratios = ratios_of(names, goal.value, goal.ratios)
            sizes = by_ratio(self._candidates, ratios)
            self._refusals[:0] = [
                Refusal(
                    f"of the multiples of {c.multiple}, none is nearer to what {ratios[c.group.name]:g} leaves",
                    c.group.name,
                )
                for c in self._candidates
                if sizes[c.group.dim] == c.group.size
            ]
        elif goal.kind == "ratio":
            sizes = to_share(self._candidates, 1 - goal.value)
        elif goal.kind == "macs":
            sizes = to_cost(self._candidates, self._macs, goal.value * self._macs.total({}))
            self._check(goal, self._macs.total(sizes) / self._macs.total({}))
        else:
            sizes = self._to_latency(goal, on)
        return {dim: size for dim, size in sizes.items() if size < dim.size}

    def _to_latency(self, goal: Goal, on: str) -> dict[Dim, int]:
        """Chooses by the table, and anew with less where the pruned graph takes longer than the table says."""
        dims = [candidate.group.dim for candidate in self._candidates]
        sizes_at = self._context.signature.sizes()
        model = Latency(
            self._whole, self._macs, dims, on, sizes_at, lambda done: self._context.progress(done, "timing layers")
        )
        share, rows = goal.value, []
        for _ in range(_TRIES):
            sizes = to_cost(self._candidates, model, share * model.total({}))
            if all(size == dim.size for dim, size in sizes.items()):  # layers too small for the clock to tell
                sizes = to_cost(self._candidates, self._macs, share * self._macs.total({}))
            graph, dimensions = self._again()
            self._shrink(graph, dimensions, self._kept(sizes, dimensions), only=())
            before, after = model.stopwatch.milliseconds(self._whole, graph)
            rows.append({"share": share, "before_ms": before, "after_ms": after})
            if after / before <= goal.value or share < goal.value / 2:
                break
            share *= 0.98 * goal.value / (after / before)
        self._details["latency"] = {"target": on, "goal": goal.value, "tries": rows}
        self._check(goal, after / before)
        return sizes

    def _check(self, goal: Goal, reached: float) -> None:
        if reached > goal.value * (1 + 1e-9):  # sums of the same numbers in another order differ
            what = f"{goal.kind} falls to {reached:.3g} of what it was, {goal.value:g} was asked for"
            self._refusals.insert(0, Refusal(f"{what}: what is left cannot shrink that far"))

    def prune(self, sizes: Mapping[Dim, int]) -> dict[str, Any]:
        """Prunes the graph to these sizes; returns the details of the result."""
        chosen = [candidate for candidate in self._candidates if candidate.group.dim in sizes]
        rows = [self._row(candidate, sizes) for candidate in chosen]
        before, after = self._macs.total({}), self._macs.total(sizes)
        kept = {candidate.group.dim: candidate.ranking.kept(sizes[candidate.group.dim]) for candidate in chosen}
        fits = self._shrink(self.graph, self._dimensions, kept)
        self.changes["dimensions pruned"] = len(rows)
        self.changes["positions removed"] = sum(row["before"] - row["after"] for row in rows)
        error = None if self._evaluation is None else number(self._evaluation.measure(self.graph).error)
        return {
            **self._details,
            "prune": rows,
            "macs": {"before": before, "after": after},
            "weight_bytes": {"before": self._whole.weight_bytes, "after": self.graph.weight_bytes},
            "error": error,
            "batches": 0 if self._evaluation is None else self._evaluation.batches,
            "fits": [fit.record() for fit in fits],
        }

    def _row(self, candidate: Candidate, sizes: Mapping[Dim, int]) -> dict[str, Any]:
        dim = candidate.group.dim
        share = 1 - self._macs.total({dim: sizes[dim]}) / max(self._macs.total({}), 1.0)
        return {
            "group": candidate.group.name,
            "before": dim.size,
            "after": sizes[dim],
            "loss": candidate.loss(sizes[dim]),
            "macs": share,
        }

    def _again(self) -> tuple[Graph, Dimensions]:
        """A copy of the whole graph with the same dimensions."""
        graph = self._whole.clone()
        return graph, Dimensions(graph)

    def _kept(self, sizes: Mapping[Dim, int], dimensions: Dimensions) -> dict[Dim, np.ndarray]:
        """The positions that stay, by the dimensions of a copy."""
        named = {group.name: group.dim for group in dimensions.groups}
        return {
            named[c.group.name]: c.ranking.kept(sizes[c.group.dim])
            for c in self._candidates
            if sizes.get(c.group.dim, c.group.size) < c.group.size
        }

    def _shrink(
        self,
        graph: Graph,
        dimensions: Dimensions,
        kept: Mapping[Dim, np.ndarray],
        *,
        only: Iterable[str] | None = None,
    ) -> list[Fit]:
        """Takes the positions that are kept, and fits layers behind them: all, or `only` some, on fewer batches."""
        changed = _reached(m.value for dim in kept for m in dimensions.group(dim).of("carries"))
        taken = resize(dimensions, kept)
        if graph is self.graph:
            self.kept = _by_input(taken)
        if not self._fits or only == ():
            return []
        outputs = {label(m.node): places for m, places in taken.items() if m.role == "writes" and m.node is not None}
        follows = {label(m.node): places for m, places in taken.items() if m.role == "follows" and m.node is not None}
        readers = {m.node for dim in kept for m in dimensions.group(dim).of("reads")}
        layers: dict[str, np.ndarray] = {}
        for node in graph.model.graph:
            layer = as_layer(node)
            reads = node in readers or (layer is not None and node.inputs[0] in changed)
            if reads and (only is None or label(node) in only):
                count = 0 if layer is None else len(layer.load())
                layers[label(node)] = outputs.get(label(node), np.arange(count))
        samples = self._context.require_calibration("prune", "to fit what is left").limited()
        if only is not None:
            return refit(self._whole, graph, layers, list(itertools.islice(samples, FITTED)))[0]
        fits, refusals = refit(
            self._whole, graph, layers, samples, progress=lambda f: self._context.progress(0.6 + 0.4 * f, "fitting")
        )
        self._refusals += refusals
        self._normalize(follows, samples)
        return fits

    def _normalize(self, kept: Mapping[str, np.ndarray], samples: Iterable[Mapping[str, np.ndarray]]) -> None:
        """Takes batch statistics anew, where the outputs are closer with them: layers that fit need none."""
        graph = self.graph.clone()
        changes = reestimate(self._whole, graph, kept, samples)
        if self._evaluation is None or not changes:
            return
        if self._evaluation.measure(graph).error < self._evaluation.measure(self.graph).error:
            self.graph = graph
            self.changes.update(changes)
        else:
            self._refusals.append(Refusal("batch statistics stay: outputs are no closer with new ones"))


def _by_input(taken: Mapping[Member, np.ndarray]) -> dict[tuple[str, int], dict[int, np.ndarray]]:
    """The positions that were taken, by node, input and axis."""
    found: dict[tuple[str, int], dict[int, np.ndarray]] = {}
    for member, places in taken.items():
        if member.node is None:
            continue
        own = [place for place, value in enumerate(member.node.inputs) if value is member.value]
        for index in own if member.index is None else [member.index]:
            found.setdefault((label(member.node), index), {})[member.axis] = places
    return found


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
