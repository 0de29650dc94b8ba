"""Scales of the plots: where a value stands between two places, and at which round values ticks stand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from ..numbers import TIMES, positive

MOST = 6
"""How many ticks an axis may have, so that their labels have room on a phone."""

POWERS = 9
"""The same where they are powers of ten or of two, which are short."""

MARGIN = 0.06
"""Share of the axis that is left free at each end, so that marks are not cut off."""

MULTIPLES = ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
"""Ticks within a decade, from the densest choice to the sparsest."""


@dataclasses.dataclass(frozen=True)
class Tick:
    """A value on an axis: its place and its label."""

    at: float
    label: str


@dataclasses.dataclass(frozen=True)
class Axis:
    """Values between `low` and `high` stand between `start` and `end`, and what lies beyond at the nearer edge."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool
    ticks: tuple[Tick, ...] = ()

    def place(self, value: float) -> float:
        """Where a value stands; it has to be finite."""
        value = min(max(value, self.low), self.high)
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def logarithmic(
    values: Iterable[float], start: float, end: float, show: Callable[[float], str], *, base: int = 10
) -> Axis:
    """An axis of magnitudes around the values, which are positive; of base 2 it has ticks at powers of two."""
    known = list(values)
    low, high = min(known), max(known)
    if high < 1.25 * low:
        low, high = low / 1.25, high * 1.25
    room = (high / low) ** MARGIN
    axis = Axis(low / room, high * room, start, end, logarithmic=True)
    return _ticked(axis, _powers_of_two(axis) if base == 2 else _round_magnitudes(axis), show)


def linear(values: Iterable[float], start: float, end: float, show: Callable[[float], str]) -> Axis:
    """An axis from zero to above the values, which are not negative."""
    axis = Axis(0.0, (positive(max(values, default=0.0)) or 1.0) * (1 + MARGIN), start, end, logarithmic=False)
    return _ticked(axis, _round_values(axis.low, axis.high), show)


def short(value: float) -> str:
    """A round value in few characters: 0.05, 250, 20k, 3M, 1e-7."""
    if value == 0 or 0.001 <= abs(value) < 10_000:
        return f"{value:.4g}"
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.4g}{unit}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def times(value: float) -> str:
    """A round ratio: 1.5x."""
    return f"{short(value)}{TIMES}"


def _ticked(axis: Axis, values: Iterable[float], show: Callable[[float], str]) -> Axis:
    return dataclasses.replace(axis, ticks=tuple(Tick(axis.place(value), show(value)) for value in values))


def _powers_of_two(axis: Axis) -> Sequence[float]:
    first, last = math.ceil(math.log2(axis.low)), math.floor(math.log2(axis.high))
    return _thinned([2.0**power for power in range(first, last + 1)], POWERS) or _round_values(axis.low, axis.high)


def _round_magnitudes(axis: Axis) -> Sequence[float]:
    decades = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
    for multiples in MULTIPLES:
        # 3 * 10**-1 is 0.30000000000000004, which its decimal text is not.
        values = [float(f"{multiple}e{decade}") for decade in decades for multiple in multiples]
        inside = [value for value in values if axis.low <= value <= axis.high]
        if len(inside) <= MOST:
            break
    return _thinned(inside, POWERS) if len(inside) > 1 else _round_values(axis.low, axis.high)


def _round_values(low: float, high: float) -> Sequence[float]:
    """At most so many multiples of 1, 2 or 5 times a power of ten."""
    decade = math.floor(math.log10((high - low) / MOST))
    steps = (float(f"{factor}e{decade + more}") for more in (0, 1, 2) for factor in (1, 2, 5))
    step = next(step for step in steps if math.floor(high / step) - math.ceil(low / step) < MOST)
    return [float(f"{step * index:.12g}") for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _thinned(values: Sequence[float], most: int) -> Sequence[float]:
    return values[:: math.ceil(len(values) / most)] if values else values
