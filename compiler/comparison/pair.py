"""The two engines of a comparison with what both are given; found and checked before anything long runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..recipe import Recipe
from .inputs import Samples, check_alike, common_sizes, samples
from .place import Place, find


@dataclasses.dataclass(frozen=True)
class Pair:
    """A, what is there, and B, what may take its place.

    Attributes:
        sizes: of the dynamic axes, to time at.
    """

    a: Place
    b: Place
    sizes: list[dict[str, int]]
    samples: Samples


def pair(a: str | Path, b: str | Path, sizes: Sequence[Mapping[str, int]], recipe: Recipe) -> Pair:
    """Finds both; `sizes` are asked for, or none to have those that both take.

    Raises:
        UsageError: no bundle or engine, different signatures, sizes or data that do not fit both.
        EngineError: an engine cannot run here.
    """
    one, other = find(a), find(b)
    check_alike(one.signature, other.signature)
    at = common_sizes(one.signature, other.signature, sizes)
    found = samples(one, other, recipe.data, at, max_samples=recipe.max_samples, seed=recipe.seed)
    return Pair(one, other, at, found)
