"""The curve of mixed precision: error against the share of the model that stays in full precision."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..numbers import error

CURVE_HEIGHT = 240
"""Pixels; the vertical scale of a curve is in pixels, the horizontal one in percent."""


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """Where a measured choice stands: `x` in percent of the width, `y` in pixels from the top."""

    x: float
    y: float
    holds: bool


@dataclasses.dataclass(frozen=True)
class GridLine:
    """A power of ten."""

    y: float
    label: str


@dataclasses.dataclass(frozen=True)
class Curve:
    """Error against cost. Choices without an error, or with an infinite one, stand at the lower or upper edge."""

    height: int
    grid: tuple[GridLine, ...]
    points: tuple[CurvePoint, ...]
    segments: tuple[tuple[CurvePoint, CurvePoint], ...]
    chosen: CurvePoint | None


def curve_chart(curve: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> Curve:
    """Places the measured choices {"cost", "error", "nodes", "holds"} of mixed precision, the cheapest first."""
    errors = [point["error"] for point in curve if point["error"]]
    lowest = math.floor(math.log10(min(errors, default=1e-3)))
    highest = max(lowest + 1, math.ceil(math.log10(max(errors, default=1.0))))

    def place(point: Mapping[str, Any]) -> CurvePoint:
        level = math.log10(point["error"]) if point["error"] else lowest if point["error"] == 0 else highest
        return CurvePoint(round(1 + 98 * point["cost"], 2), height(level), bool(point["holds"]))

    def height(level: float) -> float:
        return round(16 + (highest - level) / (highest - lowest) * (CURVE_HEIGHT - 32), 1)

    points = tuple(map(place, curve))
    same = (point for point in curve if (point["cost"], point["nodes"]) == (chosen["cost"], chosen["nodes"]))
    return Curve(
        height=CURVE_HEIGHT,
        grid=tuple(GridLine(height(level), error(10.0**level)) for level in range(lowest, highest + 1)),
        points=points,
        segments=tuple(itertools.pairwise(points)),
        chosen=next(map(place, same), None),
    )
