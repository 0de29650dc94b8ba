"""The ladder as a waterfall: each step begins where the engine stands that it was raced against.

Gains multiply, so the scale is logarithmic: a step that makes 1.3 times the speed is as long wherever it stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from ..numbers import ratio
from ..search import Climb, Tried, what_of
from .axes import Axis, Tick, logarithmic, times

LEAST = 0.5
"""The scale begins no lower: what is slower than that is cut off, so that one bad step does not press all others."""

SLIVER = 0.4
"""Width in percent of the shortest bar, so that it can be seen."""

Kind = Literal["kept", "reverted", "missing", "unmeasured", "total"]


@dataclasses.dataclass(frozen=True)
class Row:
    """A step: a bar from the level before it to its own, its interval, and the level at which the next one begins.

    Places are in percent. A step that was not raced has a mark at its level instead of a bar, `width` is None then.
    """

    label: str
    what: str
    value: str
    note: str
    reason: str
    kind: Kind
    before: float
    leads_to: float
    start: float
    width: float | None
    low: float | None = None
    high: float | None = None
    cut: bool = False


@dataclasses.dataclass(frozen=True)
class Waterfall:
    """Rows on one scale; `one` is where the first engine stands."""

    caption: str
    ticks: tuple[Tick, ...]
    one: float
    rows: tuple[Row, ...]
    left_out: int


def waterfall(climb: Climb, objective: str) -> Waterfall | None:
    """The steps that were built, and below them what they make together; None where none was raced."""
    first, *later = climb.tried
    shown = [tried for tried in later if tried.step["status"] != "skipped"]
    if not any(tried.after is not None for tried in shown):
        return None
    ends = [end for tried in shown for end in (tried.low, tried.after, tried.high) if end is not None]
    axis = logarithmic([max(LEAST, value) for value in (1.0, *ends)], 0.0, 100.0, times)
    rows = [_start(first, axis), *_rows(shown, axis)]
    if climb.total is not None:
        rows.append(_total(climb, climb.total, axis))
    what = {"size": "How many times smaller than", "throughput": "Gain in throughput over"}.get(
        objective, "Gain in speed over"
    )
    return Waterfall(
        f"{what} the captured graph, step by step",
        axis.ticks,
        axis.place(1.0),
        tuple(rows),
        sum(tried.step["status"] == "skipped" for tried in later),
    )


def _start(first: Tried, axis: Axis) -> Row:
    one = axis.place(1.0)
    return Row(first.step["step"], "", ratio(1.0), "where it begins", "", "missing", one, one, one, None)


def _rows(shown: list[Tried], axis: Axis) -> Iterator[Row]:
    for tried in shown:
        before = axis.place(tried.before)
        ends = [tried.low, tried.after, tried.high]
        low, after, high = (None if end is None else axis.place(end) for end in ends)
        cut = tried.after is not None and tried.after < axis.low
        left, right = sorted((before, before if after is None else after))
        yield Row(
            label=tried.step["step"],
            what=what_of(tried.step),
            value=ratio(tried.gain["ratio"]) if tried.gain else "",
            note=_note(tried),
            reason=tried.step["reason"],
            kind=_kind(tried),
            before=before,
            leads_to=after if tried.stays and after is not None else before,
            start=round(left, 2),
            width=None if after is None else max(SLIVER, round(right - left, 2)),
            low=None if cut else low,
            high=None if cut else high,
            cut=cut,
        )


def _kind(tried: Tried) -> Kind:
    if tried.step["status"] == "not measured":
        return "unmeasured"
    if tried.after is None:
        return "missing"
    return "kept" if tried.stays else "reverted"


def _note(tried: Tried) -> str:
    gain = tried.gain
    interval = f"{ratio(gain['low'])} to {ratio(gain['high'])}" if gain and gain["low"] != gain["high"] else ""
    return " · ".join(filter(None, (interval, tried.verdict)))


def _total(climb: Climb, total: float, axis: Axis) -> Row:
    one, end = axis.place(1.0), axis.place(total)
    left, right = sorted((one, end))
    unknown = any(tried.step["status"] == "not measured" for tried in climb.tried)
    note = "all steps that were measured and kept" if unknown else "all steps that were kept"
    width = max(SLIVER, round(right - left, 2))
    return Row(climb.pick or "", "", ratio(total), note, "", "total", end, end, round(left, 2), width)
