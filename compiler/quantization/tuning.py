"""Settles what a quantizer's options leave open by trying: each combination is measured, and the best one is kept."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ..options import render

T = TypeVar("T")

WORTH_DB = 0.3
"""Less is chance on few samples."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One combination. `snr_db` is None where nothing differs, or where there is no finite number."""

    options: str
    snr_db: float | None
    kept: bool

    def row(self) -> dict[str, Any]:
        """As JSON takes it."""
        return dataclasses.asdict(self)


def settle(
    options: T, choices: Mapping[str, Sequence[Any]], measure: Callable[[T], float], *, worth_db: float = WORTH_DB
) -> tuple[T, tuple[Trial, ...]]:
    """Tries all combinations of `choices`, the values of fields that are None in `options`.

    Args:
        options: a frozen dataclass.
        choices: by field, the value to prefer first.
        measure: gives the relative L2 error of the outputs with these options; infinite where they hold NaN.
        worth_db: how much lower the error of another combination must be than that of the first.
    """
    open_ = [name for name in choices if getattr(options, name) is None]
    combinations = [
        dataclasses.replace(options, **dict(zip(open_, values, strict=True)))  # type: ignore[type-var]
        for values in itertools.product(*(choices[name] for name in open_))
    ]
    if len(combinations) == 1:
        return combinations[0], ()
    errors = [measure(combination) for combination in combinations]
    least = min(range(len(errors)), key=errors.__getitem__)
    best = least if errors[least] < errors[0] * 10 ** (-worth_db / 20) else 0
    trials = (
        Trial(render("", combination).lstrip(":") or "defaults", _snr_db(error), combination is combinations[best])
        for combination, error in zip(combinations, errors, strict=True)
    )
    return combinations[best], tuple(trials)


def _snr_db(error: float) -> float | None:
    return -20 * math.log10(error) if 0 < error < math.inf else None
