"""The engines that a recipe asks for: every target in every precision, with the passes that lower the graph to it."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from ..errors import UnknownNameError
from ..passes import parse_pass
from ..passes.base import Pass
from ..targets.base import Target
from .options import split
from .recipe import Recipe


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


def _lowering(recipe: Recipe, target: Target, precision: str) -> tuple[Pass, ...]:
    """The target's passes with the recipe's choices; none where the target does not build this precision."""
    if precision not in target.capabilities.precisions or precision in target.refusals():
        return ()
    return tuple(_chosen(text, recipe) for text in target.lowering(precision))


def _chosen(text: str, recipe: Recipe) -> Pass:
    """A pass with the user's options of quantization, and the nodes that stay above the precision it lowers to."""
    name, options = split(text)
    fields = _fields(parse_pass(text))
    options |= {key: value for key, value in recipe.quantization.items() if key in fields and name != "cast"}
    if "keep" in fields:
        above = ("fp32",) if name in ("cast", "pin") else ("fp32", "fp16", "bf16")
        options["keep"] = "+".join(dict.fromkeys(glob for level in above for glob in recipe.keep.get(level, ())))
    return parse_pass(f"{name}:" + ",".join(f"{key}={value}" for key, value in options.items() if value != ""))


def _check_options(recipe: Recipe, variants: Sequence[Variant]) -> None:
    known = {field for variant in variants for rewrite in variant.passes for field in _fields(rewrite)}
    for name in recipe.quantization:
        if name not in known:
            raise UnknownNameError("option of quantization", name, known - {"keep", "scheme", "to"})


def _fields(rewrite: Pass) -> set[str]:
    return {field.name for field in dataclasses.fields(rewrite)}
