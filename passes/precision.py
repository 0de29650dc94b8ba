"""Chooses what is lowered by what it does to the outputs: mixed precision that holds a budget.

    1. by rule: what cannot be lowered, or would lose its meaning, stays (as `cast` and `quantize-static` do);
    2. by sensitivity: each unit of nodes is lowered alone, and the error it makes is measured on data;
    3. in the order of these errors, as few units stay as the budget needs, every choice measured as a whole;
    4. of those, what the budget allows after all is lowered.

float16 and bfloat16 are measured in an emulation that rounds each result; see `compiler.graph.emulation`.
"""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Collection
from typing import Any, ClassVar, Literal, Protocol

from ..compiler.budget import Budget
from ..compiler.data import Samples
from ..compiler.graph import Graph
from ..compiler.graph.cost import costs, share
from ..compiler.graph.emulation import emulate
from ..compiler.graph.float16 import settle
from ..compiler.graph.precision import keep
from ..compiler.graph.selection import label
from ..compiler.sensitivity import Choice, Evaluation, Sensitivity, choose, rank, split
from ..compiler.sensitivity.evaluation import labelled
from ..compiler.sensitivity.units import MOST
from ..errors import RecipeError
from .base import Context, PassResult, Refusal
from .cast import Cast, refused
from .quantize_static import QuantizeStatic, folded


@dataclasses.dataclass(frozen=True)
class Precision(QuantizeStatic):
    """Lowers as much as the context's budget allows; the rest stays float32, each node with its reason.

    The options of `quantize-static` are for to=int8, but for `keep`.

    Attributes:
        to: the smaller type.
        samples: how many batches of data the errors of units are measured on.
        checks: how many batches of data the budget is held on. The worst sample of many is worse than that of a few.
        units: with more units than that, blocks of nodes are measured in place of single heavy nodes.
    """

    name: ClassVar[str] = "precision"
    to: Literal["fp16", "bf16", "int8"] = "fp16"
    samples: int = 4
    checks: int = 64
    units: int = MOST

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.samples, self.checks, self.units) < 1:
            raise ValueError("samples, checks and units are at least 1")

    @property
    def calibrates(self) -> bool:
        """For 8 bits alone."""
        return self.to == "int8"

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Lowers in place.

        Raises:
            RecipeError: there is no data; `keep` has a pattern that matches no node; the budget needs a metric or class
                scores that there are not.
            GraphError: ONNX Runtime cannot run the graph on the data.
        """
        way: _Way = _Quantized(self, graph, context) if self.to == "int8" else _Cast(self, graph, context)
        if not way.among:
            return PassResult(modified=False, refusals=way.refusals)
        budget = context.budget or Budget.default(self.to)
        samples = _samples(context, budget)
        if samples is None:
            raise RecipeError(
                f"{self.name} measures errors on data, and there is none",
                hint=f"give --data, or cast by rule alone: cast:to={self.to}",
            )
        found = self._measured(way, samples, budget, context)
        result = way.finish(graph, found.reasons())
        notes = (Refusal(f"errors were measured on {samples.description}"),) if samples.random else ()
        return dataclasses.replace(
            result,
            changes={**result.changes, "units kept": found.units_kept()} if result.modified else {},
            refusals=notes + result.refusals,
            details={**result.details, "precision": self.to, **found.record()},
        )

    def _measured(self, way: _Way, samples: Samples, budget: Budget, context: Context) -> _Found:
        reference = emulate(way.reference)
        units = split(way.reference, way.among, most=self.units)

        def progress(runs: int) -> None:
            context.progress(runs / (runs + len(units)), f"{self.to}, variant {runs}")

        few = Evaluation(reference, samples, budget, batches=self.samples, on_run=progress)
        many = Evaluation(reference, samples, budget, batches=self.checks, on_run=progress)
        table = costs(way.reference, context.signature.sizes())

        def cost(labels: Collection[str]) -> float:
            return share(table, labels)

        ranking = rank(way.lowered_alone, units, few, cost)
        return _Found(budget, ranking, choose(way.lowered_but, ranking, many, cost), few, many)


def _samples(context: Context, budget: Budget) -> Samples | None:
    """The data of the calibration, so that engines are judged on other data; for a metric, data that has its labels."""
    if context.calibration is None:
        return context.samples
    given = context.calibration.samples
    if budget.kind != "metric" or context.samples is None:
        return given
    names = {spec.name for spec in context.signature.inputs}
    return given if next(labelled(given), {}).keys() - names else context.samples


@dataclasses.dataclass(frozen=True)
class _Found:
    """What was measured on few batches, and chosen on many."""

    budget: Budget
    ranking: list[Sensitivity]
    choice: Choice
    few: Evaluation
    many: Evaluation

    def reasons(self) -> dict[str, str]:
        """Why each kept node stays."""
        return {
            name: f"kept for the budget {self.budget}: alone, {e.unit.name!r} makes an error of {e.error:.2g}"
            for e in self.ranking
            for name in e.unit.nodes
            if name in self.choice.chosen.kept
        }

    def units_kept(self) -> int:
        return sum(not self.choice.chosen.kept.isdisjoint(entry.unit.nodes) for entry in self.ranking)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        chosen = self.choice.chosen
        return {
            "budget": str(self.budget),
            "samples": self.few.batches,
            "checks": self.many.batches,
            "runs": self.few.runs + self.many.runs,
            "sensitivity": [entry.record() for entry in self.ranking],
            "curve": [point.record() for point in self.choice.curve],
            "chosen": {**chosen.record(), "names": sorted(chosen.kept)},
        }


class _Way(Protocol):
    """How a precision is reached: the graph to compare with, the nodes that can be lowered, and variants."""

    reference: Graph
    among: frozenset[str]
    refusals: tuple[Refusal, ...]

    def lowered_alone(self, kept: Collection[str]) -> Graph:
        """A variant to run, lowered but for `kept` whatever that costs in casts."""

    def lowered_but(self, kept: Collection[str]) -> Graph:
        """A variant to run, as `finish` would make it."""

    def finish(self, graph: Graph, kept: dict[str, str]) -> PassResult:
        """Takes over the variant; `kept` has the reasons of nodes."""


class _Cast:
    """To float16 or bfloat16."""

    def __init__(self, options: Precision, graph: Graph, context: Context) -> None:
        assert options.to != "int8"
        self._cast = Cast(to=options.to, keep=options.keep)
        self._prepared = self._cast.prepare(graph, context)
        self.reference = self._prepared.graph
        lowering = self._cast.lowering(self.reference)
        self.among = frozenset(label(node) for node in self.reference.nodes() if lowering.takes(node))
        self.refusals = refused(self.reference)

    def lowered_alone(self, kept: Collection[str]) -> Graph:
        return emulate(self._lower(dict.fromkeys(kept, "kept"))[0])

    def lowered_but(self, kept: Collection[str]) -> Graph:
        return emulate(self._lower(dict.fromkeys(kept, "kept"), whole=True)[0])

    def finish(self, graph: Graph, kept: dict[str, str]) -> PassResult:
        work, changes = self._lower(kept, whole=True)
        refusals = self._prepared.unchecked + refused(work)
        if not changes["nodes lowered"]:
            return PassResult(modified=False, refusals=refusals)
        graph.model = work.model
        return PassResult(True, {**changes, "masks clamped": self._prepared.masks}, refusals)

    def _lower(self, kept: dict[str, str], *, whole: bool = False) -> tuple[Graph, dict[str, int]]:
        work = self.reference.clone()
        for node in work.nodes():
            if (reason := kept.get(label(node))) is not None:
                keep(node, reason)
        if whole:
            settle(work)
        lowering = self._cast.lowering(work)
        lowering.apply()
        return work, {"nodes lowered": lowering.lowered, "casts inserted": lowering.casts}


class _Quantized:
    """To 8 bits."""

    def __init__(self, options: Precision, graph: Graph, context: Context) -> None:
        fields = (field.name for field in dataclasses.fields(QuantizeStatic))
        asked = QuantizeStatic(**{name: getattr(options, name) for name in fields})
        asked = dataclasses.replace(asked, first_float=asked.first_float or False)  # sensitivity finds them, if any
        self.reference = folded(graph)  # no node that quantization would fold away
        self._quantize = asked.settled(self.reference, context)[0]
        # What repairs a layer by its neighbours takes long, and says nothing about one that is quantized alone.
        self._plain = dataclasses.replace(self._quantize, rounding="nearest", bias_correction=False)
        self._context = context
        _, result = self._lower(self._plain, ())
        self.refusals = result.refusals
        stay = {refusal.node for refusal in result.refusals}
        main = self.reference.model.graph
        labels = frozenset(label(node) for node in main if node.op_type != "Constant")
        self.among = labels - stay if result.modified else frozenset()

    def lowered_alone(self, kept: Collection[str]) -> Graph:
        return self._lower(self._plain, kept)[0]

    def lowered_but(self, kept: Collection[str]) -> Graph:
        return self._lower(self._quantize, kept)[0]

    def finish(self, graph: Graph, kept: dict[str, str]) -> PassResult:
        work, result = self._lower(self._quantize, kept)
        if result.modified:
            graph.model = work.model
        refusals = tuple(
            dataclasses.replace(refusal, reason=kept.get(refusal.node, refusal.reason)) for refusal in result.refusals
        )
        return dataclasses.replace(result, refusals=refusals)

    def _lower(self, quantize: QuantizeStatic, kept: Collection[str]) -> tuple[Graph, PassResult]:
        work = self.reference.clone()
        result = dataclasses.replace(quantize, keep=quantize.keep + tuple(map(glob.escape, sorted(kept)))).apply(
            work, self._context
        )
        return work, result
