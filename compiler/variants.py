"""The engines that a recipe asks for: every target in every precision, with the passes that lower the graph to it."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from ..errors import RecipeError, UnknownNameError
from ..passes import parse_pass
from ..passes.base import Pass
from ..targets.base import Target
from . import gains
from .manifest import PassRecord
from .options import split
from .pruning.goal import parse_goal
from .recipe import AUTO, HIGH, Recipe
from .sparse_attention.asked import pass_text

DEFINING = frozenset(("bits", "dtype", "keep", "scheme", "to"))
"""Options of passes that make the precision and the target's placement."""

FUSING = "fuse-attention"
"""The pass that makes what sparse attention is made of."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One engine to build.

    Attributes:
        name: ``<target>-<precision>``, numbered from the second on where one target is asked for with other options,
            and ``-pruned``, ``-sparse``, ``-sparse-attention`` or ``-aligned`` behind it with such an optional step.
        lowering: what lowers the float32 graph.
        steps: the optional steps before that.
        sibling: name of the engine without the optional step that this one has, which this one has to beat; None where
            it has none.
        refusal: why the target cannot have that step; empty where it can.
    """

    name: str
    target: Target
    precision: str
    lowering: tuple[Pass, ...]
    steps: tuple[Pass, ...] = ()
    sibling: str | None = None
    refusal: str = ""

    @property
    def passes(self) -> tuple[Pass, ...]:
        """All that happens to the graph; variants with equal passes share one."""
        return (*self.steps, *self.lowering)

    def with_step(self, word: str, step: Pass | None, refusal: str = "") -> Variant:
        """This engine with one more optional step, named by `word`; None where the target has to refuse it anyway."""
        steps = self.steps if step is None else (*self.steps, step)
        lowering = () if refusal else self.lowering
        return Variant(f"{self.name}-{word}", self.target, self.precision, lowering, steps, self.name, refusal)


def make_variants(recipe: Recipe, targets: Sequence[Target]) -> tuple[Variant, ...]:
    """All engines of a recipe, the precisions of a target side by side.

    Raises:
        UnknownNameError: an option of `quantization` that no pass of these engines has.
        RecipeError: an option with a wrong value, or of pruning where nothing is pruned.
    """
    seen: collections.Counter[str] = collections.Counter()
    variants = []
    for target in targets:
        for precision in dict.fromkeys("fp32" if p == AUTO else p for p in recipe.precisions):
            name = f"{target.name}-{precision}"
            seen[name] += 1
            numbered = name if seen[name] == 1 else f"{name}-{seen[name]}"
            plain = Variant(numbered, target, precision, lowering_of(recipe, target, precision))
            if (
                recipe.climbs and precision not in recipe.precisions
            ):  # where the ladder begins: it tries the optional steps itself
                variants.append(plain)
                continue
            for base in (plain, *pruned(recipe, plain)):
                variants += [base, *sparse(recipe, base), *attending(recipe, base), *aligned(recipe, base)]
    _check_options(recipe, variants)
    return tuple(variants)


def not_lowered(variants: Sequence[Variant], records: Sequence[PassRecord]) -> list[str]:
    """Engines below full precision whose passes found nothing to lower or to quantize, and the first reason why."""
    notes = []
    for variant in variants:
        ran = [record for record in records if variant.name in record["engines"] and record["variant"] != "all"]
        quantizing = [record for record in ran if _quantizes(record["text"])]
        deciding = quantizing or ran
        if len(ran) != len(variant.passes) or not ran or any(record["modified"] for record in deciding):
            continue
        # Beside passes that quantize stand those for the rest, which is then in fp16.
        rest = len(ran) > len(quantizing) > 0
        what = "in fp16, nothing was quantized" if rest else "in full precision, nothing was lowered"
        notes.append(f"{variant.name} is as {what}{_first_reason(deciding)}")
    return notes


def without_effect(variants: Sequence[Variant], records: Sequence[PassRecord]) -> list[str]:
    """Engines whose optional step changed nothing, and the first reason why."""
    notes = []
    for variant in variants:
        ran = [record for record in records if variant.name in record["engines"] and record["variant"] != "all"]
        own = ran[len(variant.steps) - 1 : len(variant.steps)] if variant.steps else []
        if own and not own[0]["modified"]:
            done = next(done for word, done in gains.STEPS.items() if variant.name.endswith(f"-{word}"))
            notes.append(f"{variant.name} is as {variant.sibling}, nothing was {done}{_first_reason(own)}")
    return notes


def not_written(records: Sequence[PassRecord]) -> list[str]:
    """Pruned engines whose weights could not be written as a state_dict, and the first reason why."""
    notes = []
    for record in records:
        reasons = record["details"].get("pruned_weights", {}).get("reasons", [])
        if reasons:
            notes.append(f"the weights of {record['engines'][0]} are not written: {reasons[0]}")
    return notes


def _first_reason(records: Sequence[PassRecord]) -> str:
    reasons = [refusal["reason"] for record in records for refusal in record["refusals"]]
    return f": {reasons[0]}" if reasons else ""


def _quantizes(text: str) -> bool:
    name, options = split(text)
    return name.startswith("quantize-") or options.get("to") == "int8"


def lowering_of(recipe: Recipe, target: Target, precision: str) -> tuple[Pass, ...]:
    """The target's passes with the recipe's choices; none where the target does not build this precision."""
    if not builds(target, precision):
        return ()
    return tuple(_chosen(text, recipe) for text in target.lowering(precision))


def calibrates(target: Target, precision: str, lowering: Sequence[Pass]) -> bool:
    """Whether bringing a model to a precision needs calibration data, in passes or in the target itself."""
    own = precision in target.capabilities.calibrated and builds(target, precision)
    return own or any(rewrite.calibrates for rewrite in lowering)


def builds(target: Target, precision: str) -> bool:
    """Whether a target builds engines of a precision here."""
    return precision in target.capabilities.precisions and precision not in target.refusals()


def pruned(recipe: Recipe, plain: Variant) -> tuple[Variant, ...]:
    """The engine with fewer channels, neurons and heads beside a whole one, where the recipe asks."""
    target, precision = plain.target, plain.precision
    if recipe.prune is None or target.capabilities.consumes != "graph" or not builds(target, precision):
        return ()
    goal = parse_goal(recipe.prune)
    multiple = max(target.capabilities.channels, target.capabilities.alignment.get(precision, 1))
    chosen = {k: "+".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for k, v in recipe.pruning.items()}
    options = {**goal, "multiple": str(multiple), **chosen}
    if "latency" in goal:
        options["on"] = str(target).replace(",", "+")
    return (plain.with_step("pruned", parse_pass("prune:" + ",".join(f"{k}={v}" for k, v in options.items()))),)


def sparse(recipe: Recipe, dense: Variant) -> tuple[Variant, ...]:
    """The engine with sparse weights beside a dense one, where the recipe asks: zeroed in float32, before lowering."""
    if recipe.sparsify is None or dense.refusal:
        return ()
    target = dense.target
    if recipe.sparsify not in target.capabilities.sparsity:
        return (dense.with_step("sparse", None, f"{target.name} has no kernels for {recipe.sparsify} sparse weights"),)
    step = parse_pass(f"sparsify:pattern={recipe.sparsify}") if builds(target, dense.precision) else None
    return (dense.with_step("sparse", step),)


def attending(recipe: Recipe, dense: Variant) -> tuple[Variant, ...]:
    """The engine with sparse attention beside a dense one, where the recipe asks: both with fused attention."""
    target = dense.target
    if recipe.sparse_attention is None or dense.refusal or not builds(target, dense.precision):
        return ()
    refusal = ""
    if target.capabilities.consumes != "graph" or FUSING not in target.rewrites(dense.precision):
        refusal = f"{target.name} has no operator for attention over a cache, which sparse attention is made of"
    elif not any(split(text)[0] == FUSING for text in (*recipe.passes, *map(str, dense.steps))):
        refusal = f"attention is not fused, which sparse attention is made of and has to beat: add --pass {FUSING}"
    step = None if refusal else parse_pass(pass_text(recipe.sparse_attention))
    return (dense.with_step("sparse-attention", step, refusal),)


def aligned(recipe: Recipe, plain: Variant) -> tuple[Variant, ...]:
    """The engine with aligned dimensions beside a plain one, where the recipe asks: grown in float32, before lowering.

    "auto" asks for it where the target has Tensor Cores for the precision, a number everywhere.
    """
    wanted = plain.target.capabilities.alignment.get(plain.precision) if recipe.align == "auto" else recipe.align
    takes = plain.target.capabilities.consumes == "graph" and builds(plain.target, plain.precision)
    if wanted in (None, "off", "auto") or not takes:
        return ()
    return (plain.with_step("aligned", parse_pass(f"align:multiple={wanted}")),)


def _chosen(text: str, recipe: Recipe) -> Pass:
    """A pass with the user's options of quantization, and the nodes that stay above the precision it lowers to."""
    name, options = split(text)
    rewrite = parse_pass(text)
    options |= {key: value for key, value in recipe.quantization.items() if key in _options(rewrite)}
    rewrite = parse_pass(f"{name}:" + ",".join(f"{key}={value}" for key, value in options.items()))
    if "keep" not in _fields(rewrite):
        return rewrite
    above = HIGH if options.get("to") not in HIGH and name not in ("cast", "pin") else ("fp32",)
    keep = tuple(dict.fromkeys(pattern for level in above for pattern in recipe.keep.get(level, ())))
    return dataclasses.replace(rewrite, keep=keep)  # type: ignore[call-arg]


def _check_options(recipe: Recipe, variants: Sequence[Variant]) -> None:
    if recipe.pruning and recipe.prune is None:
        raise RecipeError(
            "options of pruning are given, and nothing is to be pruned",
            found=", ".join(recipe.pruning),
            hint="say how much is to go: --prune 0.3, macs=0.7 or latency=0.7x",
        )
    known = {option for variant in variants for rewrite in variant.passes for option in _options(rewrite)}
    for name in recipe.quantization:
        if name not in known:
            raise UnknownNameError("option of quantization", name, known)


def _options(rewrite: Pass) -> set[str]:
    """What the user may choose: what does not say what the engine is."""
    quantizes = rewrite.name.startswith("quantize-") or rewrite.name == "precision"
    return _fields(rewrite) - DEFINING if quantizes else set()


def _fields(rewrite: Pass) -> set[str]:
    return {field.name for field in dataclasses.fields(rewrite)}
