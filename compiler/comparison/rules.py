"""What counts as a regression of B, and from where on."""

from __future__ import annotations

import dataclasses
import math

from ...errors import RecipeError, UnknownNameError
from ..gains import FASTER

KINDS = ("speed", "accuracy", "results", "growth")
"""The kinds of checks, in the order in which they are shown."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Limits, and which kinds of checks fail the comparison.

        speed      at one size the whole 95 % interval of A's time over B's lies below 1 / tolerance_speed
        accuracy   B exceeds its own bounds, or is off by tolerance_accuracy more than A, or its task metric is lower
                   by tolerance_metric with its whole 95 % interval
        results    B gives other results than A
        growth     B is larger than A by more than max_growth, as files or on the GPU

    Attributes:
        tolerance_speed: ratio of times within which two engines are equally fast.
        tolerance_accuracy: relative L2 that B may be farther from its reference than A from its own; None leaves it to
            the bounds that each engine was compiled with.
        tolerance_metric: what the task metric may lose.
        max_growth: share that files and GPU memory may grow by; None tells it without judging.
        fail_on: the kinds that count; the others are information.
    """

    tolerance_speed: float = FASTER
    tolerance_accuracy: float | None = None
    tolerance_metric: float = 0.0
    max_growth: float | None = None
    fail_on: tuple[str, ...] = ("speed", "accuracy", "growth")

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tolerance_speed) and self.tolerance_speed >= 1):
            raise RecipeError(
                "tolerance of speed is no ratio", expected="a number of at least 1", found=self.tolerance_speed
            )
        for what in ("tolerance_accuracy", "tolerance_metric", "max_growth"):
            value = getattr(self, what)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise RecipeError(
                    f"{what.replace('_', '-')} is no bound", expected="a number of at least 0", found=value
                )
        for name in self.fail_on:
            if name not in KINDS:
                raise UnknownNameError("kind of regression", name, KINDS)
