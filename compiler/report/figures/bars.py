"""Bars on one scale: speeds of engines, stages of the compile, sensitivities of dimensions."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ...manifest import Stage, Timing
from ..numbers import TIMES, error, number, ratio, seconds

FULL = 98.0
"""Width of the longest bar, so that the end of its interval is not cut off."""

SLIVER = 0.4
"""Width of the shortest bar of a stage, so that it can be seen."""


@dataclasses.dataclass(frozen=True)
class Bar:
    """One row: `start` and `width` place the bar, `low` and `high` its interval (None where there is none)."""

    label: str
    value: str
    note: str
    tone: Literal["baseline", "plain", "best", "wrong"]
    start: float
    width: float
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Chart:
    """Bars on one scale. `rule` is where the line of the baseline stands."""

    caption: str
    bars: tuple[Bar, ...]
    rule: float | None = None


def speed_chart(
    timings: Sequence[Timing], *, baseline: str, best: str | None, wrong: Sequence[str], caption: str
) -> Chart:
    """Speed against the baseline: the baseline first, then the fastest. Longer is faster.

    Args:
        wrong: candidates that failed validation; they are measured too, and told apart by words and pattern.
    """
    ratios = {timing["candidate"]: _ratio(timing, baseline) for timing in timings}
    ends = [_finite(timing["speed_up"]["high"]) or 0.0 for timing in timings if timing["speed_up"]]
    scale = FULL / max([1.0, *ends, *(value for value in ratios.values() if value is not None)])

    def bar(timing: Timing) -> Bar:
        name, speed_up = timing["candidate"], timing["speed_up"]
        value = ratios[name]
        low = _finite(speed_up["low"]) if speed_up and value is not None else None
        high = _finite(speed_up["high"]) if speed_up and value is not None else None
        return Bar(
            label=name,
            value=ratio(value) if name != baseline else f"1{TIMES}",
            note=" · ".join(_notes(timing, baseline=baseline, best=best, wrong=wrong)),
            tone="baseline" if name == baseline else "wrong" if name in wrong else "best" if name == best else "plain",
            start=0.0,
            width=round((value or 0.0) * scale, 2),
            low=None if low is None else round(low * scale, 2),
            high=None if high is None else round(high * scale, 2),
        )

    order = sorted(timings, key=lambda t: (t["candidate"] != baseline, -(ratios[t["candidate"]] or 0.0)))
    return Chart(caption, tuple(map(bar, order)), rule=round(scale, 2))


def stage_chart(stages: Sequence[Stage]) -> Chart:
    """One stage below the other, each bar starting where the one before it ended; those that took no time left out."""
    stages = [stage for stage in stages if stage["seconds"] != 0]
    durations = [_finite(stage["seconds"]) or 0.0 for stage in stages]
    ends = [0.0, *itertools.accumulate(durations)]
    shares = [FULL * end / ends[-1] if ends[-1] else 0.0 for end in ends]
    bars = tuple(
        Bar(
            label=stage["name"],
            value=seconds(stage["seconds"]),
            note=stage["detail"],
            tone="plain",
            start=round(shares[index], 2),
            width=max(SLIVER, round(shares[index + 1] - shares[index], 2)),
        )
        for index, stage in enumerate(stages)
    )
    return Chart(f"Time of each stage, {seconds(ends[-1])} in all", bars)


MOST = 12
"""How many dimensions a chart of sensitivities shows; tables have all."""


def sensitivity_chart(rows: Sequence[Mapping[str, Any]]) -> Chart:
    """Errors {"group", "size", "tried", "error"} of dimensions that alone were pruned, the largest first."""
    shown = [row for row in rows if row["error"] is not None][:MOST]
    scale = FULL / max([row["error"] for row in shown if row["error"]], default=1.0)
    bars = tuple(
        Bar(
            label=row["group"],
            value=error(row["error"]),
            note=f"{row['tried']:,} of {row['size']:,} positions left",
            tone="plain",
            start=0.0,
            width=max(SLIVER, round(row["error"] * scale, 2)),
        )
        for row in shown
    )
    left_out = f"; the {len(shown)} largest of {len(rows)}" if len(rows) > len(shown) else ""
    return Chart(f"Relative error that the outputs get when one dimension alone is pruned{left_out}", bars)


def _ratio(timing: Timing, baseline: str) -> float | None:
    if timing["candidate"] == baseline:
        return 1.0
    return _finite(timing["speed_up"]["ratio"]) if timing["speed_up"] else None


def _notes(timing: Timing, *, baseline: str, best: str | None, wrong: Sequence[str]) -> list[str]:
    name, speed_up = timing["candidate"], timing["speed_up"]
    notes = []
    if speed_up and _finite(speed_up["ratio"]) is not None:
        notes.append(f"{ratio(speed_up['low'])} to {ratio(speed_up['high'])}")
    if _finite(timing["p50_ms"]) is not None:
        notes.append(f"{number(timing['p50_ms'])} ms")
    if name == baseline:
        notes.append("baseline")
    if name in wrong:
        notes.append("failed validation")
    elif name == best:
        notes.append("best")
    elif speed_up and speed_up["high"] < 1:
        notes.append("slower")
    elif speed_up and speed_up["low"] <= 1:
        notes.append("no clear difference")
    if not timing["steady"]:
        notes.append("never steady")
    return notes


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
