"""Ratios for single dimensions, as text: ``glob:ratio``."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from ...errors import RecipeError


def check_ratios(texts: Iterable[str]) -> None:
    """Raises ValueError where a text is no glob with a ratio from 0 to below 1."""
    for text in texts:
        parse_ratio(text)


def parse_ratio(text: str) -> tuple[str, float]:
    """The glob and the ratio.

    Raises:
        ValueError: the text has another form.
    """
    pattern, _, number = text.rpartition(":")
    try:
        ratio = float(number)
    except ValueError:
        ratio = -1.0
    if not pattern or not 0 <= ratio < 1:
        raise ValueError(f"{text!r} is no glob:ratio with a ratio from 0 to below 1")
    return pattern, ratio


def ratios_of(names: Sequence[str], default: float, texts: Iterable[str]) -> dict[str, float]:
    """The ratio of each dimension: the first that matches, else the default.

    Raises:
        RecipeError: a glob matches no dimension.
    """
    found: dict[str, float] = {}
    for text in texts:
        pattern, ratio = parse_ratio(text)
        for name in matching(names, pattern):
            found.setdefault(name, ratio)
    return {name: found.get(name, default) for name in names}


def matching(names: Sequence[str], pattern: str) -> list[str]:
    """The dimensions that a name or glob matches.

    Raises:
        RecipeError: none.
    """
    found = [name for name in names if name == pattern or fnmatch.fnmatchcase(name, pattern)]
    if not found:
        raise RecipeError(
            f"no dimension that can be pruned matches {pattern!r}",
            expected="a name or glob of a dimension",
            found=f"{len(names)} dimensions, among them {', '.join(map(repr, names[:3])) or 'none'}",
            hint="enginesmith inspect --groups lists them",
        )
    return found
