"""The engines that a recipe asks for: every target in every precision, with the passes that lower the graph to it."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from ..errors import UnknownNameError
from ..passes import parse_pass
from ..passes.base import Pass
from ..targets.base import Target
from .manifest import PassRecord
from .options import split
from .recipe import HIGH, Recipe

DEFINING = frozenset(("bits", "dtype", "keep", "scheme", "to"))
"""Options of passes that make the precision and the target's placement."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One engine to build.

    Attributes:
        name: ``<target>-<precision>``, numbered from the second on where one target is asked for with other options,
            and ``-sparse`` behind it with sparse weights.
        passes: what lowers the float32 graph; variants with equal passes share one graph.
        sibling: name of the engine without the optional step that this one has, which this one has to beat; None where
            it has none.
        refusal: why the target cannot have that step; empty where it can.
    """

    name: str
    target: Target
    precision: str
    passes: tuple[Pass, ...]
    sibling: str | None = None
    refusal: str = ""


def make_variants(recipe: Recipe, targets: Sequence[Target]) -> tuple[Variant, ...]:
    """All engines of a recipe, the precisions of a target side by side.

    Raises:
        UnknownNameError: an option of `quantization` that no pass of these engines has.
        RecipeError: an option with a wrong value.
    """
    seen: collections.Counter[str] = collections.Counter()
    variants = []
    for target in targets:
        for precision in recipe.precisions:
            name = f"{target.name}-{precision}"
            seen[name] += 1
            numbered = name if seen[name] == 1 else f"{name}-{seen[name]}"
            dense = Variant(numbered, target, precision, _lowering(recipe, target, precision))
            variants += [dense, *_sparse(recipe, dense)]
    _check_options(recipe, variants)
    return tuple(variants)


def not_lowered(variants: Sequence[Variant], records: Sequence[PassRecord]) -> list[str]:
    """Engines below full precision whose passes found nothing to lower, and the first reason why."""
    notes = []
    for variant in variants:
        ran = [record for record in records if variant.name in record["engines"] and record["variant"] != "all"]
        if len(ran) == len(variant.passes) > 0 and not any(record["modified"] for record in ran):
            reasons = [refusal["reason"] for record in ran for refusal in record["refusals"]]
            why = f": {reasons[0]}" if reasons else ""
            notes.append(f"{variant.name} is as in full precision, nothing was lowered{why}")
    return notes


def _lowering(recipe: Recipe, target: Target, precision: str) -> tuple[Pass, ...]:
    """The target's passes with the recipe's choices; none where the target does not build this precision."""
    if not _builds(target, precision):
        return ()
    return tuple(_chosen(text, recipe) for text in target.lowering(precision))


def not_sparse(variants: Sequence[Variant], records: Sequence[PassRecord]) -> list[str]:
    """Engines that were to have sparse weights and have none, and the first reason why."""
    notes = []
    for variant in variants:
        ran = [record for record in records if variant.name in record["engines"] and record["variant"] != "all"]
        if variant.sibling is not None and ran and not ran[0]["modified"]:  # sparsify comes before what lowers
            why = f": {refusals[0]['reason']}" if (refusals := ran[0]["refusals"]) else ""
            notes.append(f"{variant.name} is as {variant.sibling}, nothing was made sparse{why}")
    return notes


def _builds(target: Target, precision: str) -> bool:
    return precision in target.capabilities.precisions and precision not in target.refusals()


def _sparse(recipe: Recipe, dense: Variant) -> tuple[Variant, ...]:
    """The engine with sparse weights beside a dense one, where the recipe asks: zeroed in float32, before lowering."""
    if recipe.sparsify is None:
        return ()
    target, name = dense.target, f"{dense.name}-sparse"
    if recipe.sparsify not in target.capabilities.sparsity:
        refusal = f"{target.name} has no kernels for {recipe.sparsify} sparse weights"
        return (dataclasses.replace(dense, name=name, passes=(), sibling=dense.name, refusal=refusal),)
    zeroing = (parse_pass(f"sparsify:pattern={recipe.sparsify}"),) if _builds(target, dense.precision) else ()
    return (dataclasses.replace(dense, name=name, passes=(*zeroing, *dense.passes), sibling=dense.name),)


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
