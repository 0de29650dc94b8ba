"""Removes whole channels, neurons and attention heads, and fits what is left to what the model gave before.

    y = W x + b   ->   y = W' x[kept] + b'        for every reader of a dimension, W' and b' by least squares on data

A dimension is removed wherever it stands: in the weights that make it and that read it, in normalizations, across sums,
concatenations and reshapes. Left alone are dimensions that inputs or outputs of the model show, that an operator runs
over or that is not followed, and the inner parts of heads and groups, of which whole ones go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from ..compiler.graph import Graph
from ..compiler.pruning.goal import Goal, Scope
from ..compiler.pruning.importance import MEASURED, Importance
from ..compiler.pruning.ratios import check_ratios
from ..compiler.pruning.run import Pruning
from .base import Context, Pass, PassResult, Refusal

RATIO = 0.3
"""The share that goes where no goal is given."""

MARK = "enginesmith.pruned"
"""Metadata of a graph that was pruned: what is left is not pruned again."""


@dataclasses.dataclass(frozen=True)
class Prune(Pass):
    """Structured pruning with calibration data in place of training.

    One of `ratio`, `macs` and `latency` is the goal; where none is given, a ratio of `RATIO`.

    Attributes:
        ratio: share of the positions of each dimension that goes (scope=local), or of all together (scope=global).
        macs: share of the model's multiply-adds that stays.
        latency: share of the model's time on the target that stays.
        scope: what `ratio` is a share of.
        ratios: ``glob:ratio`` for single dimensions, in place of `ratio`; the first that matches counts.
        importance: what decides which positions go; "auto" is "obs" where there is calibration data, else "l2".
        refit: fit the weights that are left. None: where there is calibration data.
        multiple: sizes are multiples of that; whole heads and groups are of their own size.
        sensitivity: measure the error that each dimension makes alone.
        keep: names or globs of dimensions that stay, as `enginesmith inspect --groups` tells them.
        on: the target that `latency` is measured on, its options joined by ``+``.
    """

    name: ClassVar[str] = "prune"
    ratio: float | None = None
    macs: float | None = None
    latency: float | None = None
    scope: Scope = "local"
    ratios: tuple[str, ...] = ()
    importance: Literal["auto", "l1", "l2", "activation", "hessian", "obs", "taylor"] = "auto"
    refit: bool | None = None
    multiple: int = 8
    sensitivity: bool = True
    keep: tuple[str, ...] = ()
    on: str = "onnxruntime-cpu"

    def __post_init__(self) -> None:
        given = [name for name in ("ratio", "macs", "latency") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"one of ratio, macs and latency is the goal, found {' and '.join(given)}")
        if not 0 < self.goal.value < 1:
            raise ValueError(f"{self.goal.kind} is a share between 0 and 1, found {self.goal.value:g}")
        if self.multiple < 1:
            raise ValueError(f"multiple is at least 1, found {self.multiple}")
        check_ratios(self.ratios)
        if self.ratios and (self.goal.kind != "ratio" or self.scope == "global"):
            raise ValueError("ratios are for ratio with scope=local")

    @property
    def goal(self) -> Goal:
        """What is to be reached."""
        if self.macs is not None:
            return Goal("macs", self.macs)
        if self.latency is not None:
            return Goal("latency", self.latency)
        return Goal("ratio", RATIO if self.ratio is None else self.ratio, self.scope, self.ratios)

    @property
    def calibrates(self) -> bool:
        """Where it measures, fits or takes gradients."""
        return self._observes or self.differentiates

    @property
    def differentiates(self) -> bool:
        """Where gradients say what is important."""
        return self.importance == "taylor"

    @property
    def _observes(self) -> bool:
        return self.refit is True or self.importance in MEASURED

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Prunes in place.

        Raises:
            RecipeError: calibration data or a torch module is asked for, and there is none; `keep` or `ratios` has a
                pattern that matches no dimension; latency is the goal, and nothing can be timed.
            GraphError: ONNX Runtime refuses the graph or the data.
        """
        if earlier := graph.model.metadata_props.get(MARK):
            return PassResult(modified=False, refusals=(Refusal(f"the graph was pruned already, by {earlier}"),))
        calibration = context.calibration
        if self._observes:
            calibration = context.require_calibration(self.name, "to see what its layers read")
        importance: Importance = ("obs" if calibration else "l2") if self.importance == "auto" else self.importance
        fits = calibration is not None and self.refit is not False
        run = Pruning(graph, context, importance, multiple=self.multiple, keep=self.keep, fits=fits)
        if self.sensitivity:
            run.measure()
        sizes = run.allocate(self.goal, self.on)
        if not sizes:
            return PassResult(modified=False, refusals=run.refusals)
        details: Mapping[str, Any] = run.prune(sizes)
        refusals = run.refusals
        if calibration is None:
            refusals = (Refusal("nothing is fitted to what was there before: there is no calibration data"), *refusals)
        graph.model = run.graph.model
        graph.model.metadata_props[MARK] = str(self)
        return PassResult(modified=True, changes=run.changes, refusals=refusals, details=details, kept=run.kept)
