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
        name: ``<target>-<precision>``, numbered from the second on where one target is asked for with other options.
        passes: what lowers the float32 graph; variants with equal passes share one graph.
    """

    name: str
    target: Target
    precision: str
    passes: tuple[Pass, ...]


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
            variants.append(Variant(numbered, target, precision, _lowering(recipe, target, precision)))
    _check_options(recipe, variants)
    return tuple(variants)


def not_lowered(variants: Sequence[Variant], records: Sequence[PassRecord]) -> list[str]:
    """Engines below full precision whose passes found nothing to lower or to quantize, and the first reason why."""
    notes = []
    for variant in variants:
        ran = [record for record in records if variant.name in record["engines"] and record["variant"] != "all"]
        quantizing = [record for record in ran if _quantizes(record["text"])]
        if len(ran) != len(variant.passes) or any(record["modified"] for record in quantizing or ran) or not ran:
            continue
        reasons = [refusal["reason"] for record in quantizing or ran for refusal in record["refusals"]]
        why = f": {reasons[0]}" if reasons else ""
        # Beside passes that quantize stand those for the rest, which is then in fp16.
        rest = len(ran) > len(quantizing) > 0
        what = "in fp16, nothing was quantized" if rest else "in full precision, nothing was lowered"
        notes.append(f"{variant.name} is as {what}{why}")
    return notes


def _quantizes(text: str) -> bool:
    name, options = split(text)
    return name.startswith("quantize-") or options.get("to") == "int8"


def _lowering(recipe: Recipe, target: Target, precision: str) -> tuple[Pass, ...]:
    """The target's passes with the recipe's choices; none where the target does not build this precision."""
    if precision not in target.capabilities.precisions or precision in target.refusals():
        return ()
    return tuple(_chosen(text, recipe) for text in target.lowering(precision))


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
