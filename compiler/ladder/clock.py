"""How long the ladder may take, what a step costs, and what it tells of the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..progress import Progress, Stages

LIMITS_S = {"quick": 240.0, "default": 1200.0, "thorough": 7200.0}
"""Seconds after which no further step begins, by effort."""


class Clock:
    """Counts seconds against a limit.

    Attributes:
        limit_s: the limit.
    """

    def __init__(self, limit_s: float, show: Callable[[float, str], None]) -> None:
        self.limit_s = limit_s
        self._show = show
        self._start = time.perf_counter()
        self._costs: dict[str, list[float]] = {}
        self._until_s = limit_s
        self._ahead = 0
        self._what = ""

    def allot(self, parts: int) -> None:
        """Gives what begins now one of this many equal parts of the time that is left."""
        self._until_s = self.spent_s + max(0.0, self.limit_s - self.spent_s) / parts

    @property
    def spent_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    @property
    def left_s(self) -> float:
        """Seconds to the end of the part that was allotted."""
        return self._until_s - self.spent_s

    def cost_s(self, kind: str) -> float:
        """Seconds that a candidate of this kind of step took so far in the mean, or of all kinds, or 0 at first."""
        known = self._costs.get(kind) or [cost for costs in self._costs.values() for cost in costs]
        return sum(known) / len(known) if known else 0.0

    def lacks(self, kind: str) -> str:
        """What is missing for one more candidate of this kind; empty where there is time."""
        expected = self.cost_s(kind)
        if self.left_s > expected:
            return ""
        return (
            f"about {in_words(expected)} needed, {in_words(self.left_s)} left" if expected else "the limit is reached"
        )

    def note(self, kind: str, seconds: float) -> None:
        """Remembers what a candidate took."""
        self._costs.setdefault(kind, []).append(seconds)

    def tell(self, what: str, ahead: int) -> None:
        """Shows what is being done, with `ahead` candidates to come and this one."""
        self._what, self._ahead = what, ahead
        self.detail(0.0, "")

    def detail(self, fraction: float, what: str) -> None:
        """Shows what is being done within a step; the bar follows the time, not the step."""
        expected = min(self._ahead * self.cost_s(""), max(0.0, self.left_s))
        left = f"about {in_words(expected)} left" if self._costs else f"at most {in_words(self.left_s)} left"
        total = self.spent_s + expected if self._costs else self.limit_s
        text = f"{self._what}: {what}, {left}" if what else f"{self._what}, {left}"
        self._show(min(1.0, self.spent_s / max(total, 1e-9)), text)

    def stages(self) -> Stages:
        """What takes the place of a compile's stages for those that work within a step."""
        clock = self

        class Within(Progress):
            def update(self, fraction: float, what: str) -> None:
                clock.detail(fraction, what)

        return Stages(Within(), 1)


def in_words(seconds: float) -> str:
    """Seconds as people say them."""
    seconds = max(0.0, seconds)
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
