"""What the ladder tries on a target: rungs in order, each with candidates that stand against the incumbent.

    precision       fp16 and bf16
    quantization    8 bits with ranges from calibration, dynamic, and weights alone
    mixed           where one of these was not close enough: with some nodes in higher precision
    pruning         fewer channels, where a budget says what it may cost
    sparsity        2:4, likewise
    alignment       dimensions grown to what Tensor Cores take
    rewrites        what the target runs better, as fused attention
    attention       to few keys of a decoder's cache, where the user asks for it
    caches          of a decoder in 8 bits
    options         of the target, one question a rung

Passes that change the float32 graph are run before those that lower it, whichever rung found them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from ...passes import parse_pass
from ...passes.base import Pass
from ...targets.base import Effort, Target, Tuning
from ..manifest import LadderStep
from ..options import split
from ..recipe import Recipe
from ..variants import FUSING, Variant, aligned, attending, builds, calibrates, lowering_of, pruned, sparse

EFFORTS: tuple[Effort, ...] = ("quick", "default", "thorough")

HALF = ("fp16", "bf16")
EIGHT: Mapping[str, Effort] = {
    "int8": "quick",
    "fp8": "quick",
    "int8-dynamic": "default",
    "int8-weights": "thorough",
    "int4-weights": "thorough",
}
"""Quantized precisions, and the least effort at which they are tried."""

FALLBACKS = {"fp16": "mixed-fp16", "bf16": "mixed-bf16", "int8": "mixed"}
"""What to try where a precision is not close enough."""

NO_DATA = "it needs calibration data: give --data with 32 to 512 real samples, or --random-calibration"
STORING = "kv-cache"
"""The pass that keeps caches in 8 bits."""

PRUNED_SHARE = "macs=0.75"
"""What is left of the multiply-adds where the user gives a budget and does not say how much is to go."""


@dataclasses.dataclass(frozen=True)
class Rung:
    """Candidates of one kind, of which the best is kept, if any.

    Attributes:
        left_out: what is not tried, and why.
        asked: whether the user asked for it in so many words.
    """

    name: str
    candidates: tuple[Variant, ...] = ()
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    asked: bool = False


@dataclasses.dataclass(frozen=True)
class Situation:
    """Where the ladder stands on a target: the engine to beat, what was tried before, and whether it is a decoder."""

    recipe: Recipe
    incumbent: Variant
    steps: Sequence[LadderStep] = ()
    decodes: bool = False

    def inaccurate(self, precision: str) -> bool:
        """Whether an engine of that precision was built and not close enough: such a one is not timed."""
        ending = f"-{precision}"
        return any(s["candidate"].endswith(ending) and s["status"] == "reverted" and not s["ratio"] for s in self.steps)


Planner = Callable[[Situation], Rung]


def planners(target: Target, recipe: Recipe) -> tuple[Planner, ...]:
    """The rungs that every target has."""
    if target.capabilities.consumes == "module":
        return (_precision, _quantization)
    return (_precision, _quantization, _mixed, _pruning, _sparsity, _alignment)


def own_rungs(situation: Situation) -> Iterator[Rung]:
    """The rungs of the incumbent's target: rewrites that it gains by, then its options."""
    recipe, incumbent = situation.recipe, situation.incumbent
    if incumbent.target.capabilities.consumes == "graph":
        for text in incumbent.target.rewrites(incumbent.precision):
            yield _rewriting(incumbent, parse_pass(text))
        if recipe.sparse_attention is not None:
            yield _attention(situation, recipe.sparse_attention)
        if situation.decodes and FUSING in incumbent.target.rewrites(incumbent.precision):
            yield _caches(situation)
    for tuning in incumbent.target.tunings(incumbent.precision):
        if _reaches(recipe.effort, tuning.effort):
            yield Rung(tuning.what, retuned(incumbent, tuning, recipe))


def remaining(planned: Sequence[Planner], situation: Situation) -> int:
    """How many candidates are ahead, as far as one can tell now."""
    ahead = sum(len(planner(situation).candidates) for planner in planned)
    return ahead + sum(len(rung.candidates) for rung in own_rungs(situation))


def retuned(variant: Variant, tuning: Tuning, recipe: Recipe) -> tuple[Variant, ...]:
    """The variant with each of the alternatives that differ from what it has."""
    base = re.sub(r"-tuned(-\d+)?$", "", variant.name)
    found = []
    for options in tuning.alternatives:
        target = dataclasses.replace(variant.target, **options)
        if target != variant.target:
            lowering = lowering_of(recipe, target, variant.precision)
            found.append(dataclasses.replace(variant, name=f"{base}-tuned", target=target, lowering=lowering))
    return tuple(found)


def _precision(situation: Situation) -> Rung:
    return _lowered(situation, "precision", HALF)


def _quantization(situation: Situation) -> Rung:
    small = situation.recipe.objective.startswith("size")
    tried = [name for name, least in EIGHT.items() if small or _reaches(situation.recipe.effort, least)]
    return _lowered(situation, "quantization", tried)


def _mixed(situation: Situation) -> Rung:
    wanted = [mixed for plain, mixed in FALLBACKS.items() if situation.inaccurate(plain)]
    return _lowered(situation, "mixed precision", wanted if _reaches(situation.recipe.effort, "default") else ())


def _lowered(situation: Situation, name: str, precisions: Sequence[str]) -> Rung:
    recipe, incumbent = situation.recipe, situation.incumbent
    candidates, left_out = [], {}
    for precision in precisions:
        if precision == incumbent.precision or not builds(incumbent.target, precision):
            continue
        lowering = lowering_of(recipe, incumbent.target, precision)
        if calibrates(incumbent.target, precision, lowering) and not has_data(recipe):
            left_out[precision] = NO_DATA
            continue
        words = incumbent.name.removeprefix(f"{incumbent.target.name}-{incumbent.precision}")
        full = f"{incumbent.target.name}-{precision}{words}"
        candidates.append(dataclasses.replace(incumbent, name=full, precision=precision, lowering=lowering))
    return Rung(name, tuple(candidates), left_out)


def _pruning(situation: Situation) -> Rung:
    recipe, asked = situation.recipe, situation.recipe.prune is not None
    wanted = asked or (recipe.budget is not None and _reaches(recipe.effort, "default"))
    if not wanted:
        return Rung("pruning")
    goal = recipe.prune or PRUNED_SHARE
    found = pruned(recipe.model_copy(update={"prune": goal}), situation.incumbent)
    return _with_data("pruning", goal, found, situation, asked=asked)


def _sparsity(situation: Situation) -> Rung:
    recipe, asked = situation.recipe, situation.recipe.sparsify is not None
    incumbent = situation.incumbent
    if not asked and (recipe.budget is None or "2:4" not in incumbent.target.capabilities.sparsity):
        return Rung("sparsity")
    found = sparse(recipe.model_copy(update={"sparsify": "2:4"}), incumbent)
    if left_out := {str(variant.target): variant.refusal for variant in found if variant.refusal}:
        return Rung("sparsity", (), left_out, asked=asked)
    return _with_data("sparsity", "2:4", found, situation, asked=asked)


def _attention(situation: Situation, asked: str) -> Rung:
    name, incumbent = "sparse attention", situation.incumbent
    if any(step.name == "sparse-attention" for step in incumbent.steps):
        return Rung(name, asked=True)
    found = attending(situation.recipe, incumbent)
    if reason := next((variant.refusal for variant in found if variant.refusal), ""):
        return Rung(name, (), {asked: reason}, asked=True)
    return _with_data(name, asked, found, situation, asked=True)


def _caches(situation: Situation) -> Rung:
    """8 bits are a quarter of the caches, which count where size does; a token may gain too, as it reads less.

    Attention is fused with it where that was not worth its while alone, as other attention converts whole caches.
    """
    name, incumbent, recipe = "caches", situation.incumbent, situation.recipe
    small = recipe.objective.startswith("size")
    known = [*(split(text)[0] for text in recipe.passes), *(step.name for step in incumbent.steps)]
    if STORING in known or not (small or _reaches(recipe.effort, "default")):
        return Rung(name)
    if "sparse-attention" in known:
        return Rung(name, (), {STORING: "sparse attention reads caches as they are"})
    fused = incumbent if FUSING in known else _rewriting(incumbent, parse_pass(FUSING)).candidates[0]
    stored = dataclasses.replace(fused.with_step(STORING, parse_pass(STORING)), sibling=incumbent.name)
    return _with_data(name, STORING, (stored,), situation, asked=False)


def _with_data(name: str, what: str, found: tuple[Variant, ...], situation: Situation, *, asked: bool) -> Rung:
    """The rung, or the reason where its passes look at what layers read, and there are no data."""
    if has_data(situation.recipe) or not any(rewrite.calibrates for variant in found for rewrite in variant.steps):
        return Rung(name, found, asked=asked)
    return Rung(name, left_out={what: NO_DATA}, asked=asked)


def _alignment(situation: Situation) -> Rung:
    recipe = situation.recipe
    wanted = recipe.model_copy(update={"align": recipe.align or "auto"})
    return Rung("alignment", aligned(wanted, situation.incumbent), asked=recipe.align not in (None, "off"))


def _rewriting(incumbent: Variant, rewrite: Pass) -> Rung:
    """A rewrite comes behind other steps, and before what lowers the graph."""
    if rewrite in incumbent.steps:
        return Rung(rewrite.name)
    step = incumbent.with_step("fused", rewrite)
    name = incumbent.name if "-fused" in incumbent.name else step.name
    return Rung(rewrite.name, (dataclasses.replace(step, name=name),))


def _reaches(effort: Effort, least: Effort) -> bool:
    return EFFORTS.index(effort) >= EFFORTS.index(least)


def has_data(recipe: Recipe) -> bool:
    """Whether passes may look at what layers read."""
    return bool(recipe.data or recipe.calibration_data or recipe.random_calibration)
