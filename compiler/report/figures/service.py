"""Latency of a service against the requests a second that it is asked for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ..numbers import number
from .axes import linear, logarithmic, short
from .plot import Entry, Line, Mark, Note, Plot

HEIGHT = 260
TOP = 28.0
KINDS: Mapping[float, str] = {50.0: "plain", 99.0: "front"}
"""Percentiles that are drawn, with the kind of their marks."""


def service_plot(rates: Sequence[Mapping[str, Any]], knee: float | None, own_ms: float | None) -> Plot | None:
    """p50 and p99 by the rate that was offered; None where fewer than two rates were answered.

    Args:
        rates: the measurements of open loops, as the result of a load test has them.
        knee: the rate at the knee.
        own_ms: what the engine takes by itself.
    """
    points = sorted((rate for rate in rates if rate["percentiles"]), key=lambda rate: float(rate["offered"]))
    if len(points) < 2:
        return None
    times = {
        percent: [next(found["ms"] for found in rate["percentiles"] if found["percent"] == percent) for rate in points]
        for percent in KINDS
    }
    x = linear([rate["offered"] for rate in points], 0.0, 100.0, short)
    every = [*itertools.chain(*times.values()), *([own_ms] if own_ms else [])]
    y = logarithmic(every, HEIGHT - 1, TOP, short)
    marks, lines = list[Mark](), list[Line]()
    for percent, kind in KINDS.items():
        drawn = [
            Mark(x.place(rate["offered"]), y.place(ms), "circle" if rate["keeps_up"] else "cross",
                 kind if rate["keeps_up"] else "wrong", _title(rate, percent, ms), 4.0)
            for rate, ms in zip(points, times[percent], strict=True)
        ]  # fmt: skip
        marks += drawn
        lines += [Line(one.x, one.y, other.x, other.y, "line") for one, other in itertools.pairwise(drawn)]
    if own_ms:
        lines.append(Line(0.0, y.place(own_ms), 100.0, y.place(own_ms), "limit"))
    at = None if knee is None else x.place(knee)
    if at is not None:
        lines.append(Line(at, 18, at, HEIGHT, "guide"))
    legend = [Entry("p50", "plain", "circle"), Entry("p99", "front", "circle")]
    if any(not rate["keeps_up"] for rate in points):
        legend.append(Entry("does not keep up", "wrong", "cross"))
    if own_ms:
        legend.append(Entry(f"the engine by itself, {number(own_ms)} ms", "limit"))
    return Plot(
        caption="Latency by the requests a second that are due; lower is better",
        summary=", ".join(
            f"p99 {number(ms)} ms at {number(rate['offered'])}" for rate, ms in zip(points, times[99.0], strict=True)
        ),
        across="Requests a second",
        up="Latency, ms",
        height=HEIGHT,
        x_ticks=x.ticks,
        y_ticks=y.ticks,
        marks=tuple(marks),
        lines=tuple(lines),
        notes=() if at is None else (Note(at, 14, "knee", "end" if at > 70 else "start" if at < 30 else "middle"),),
        legend=tuple(legend),
    )


def _title(rate: Mapping[str, Any], percent: float, ms: float) -> str:
    return f"{number(rate['offered'])} requests/s: p{percent:g} {number(ms)} ms, {number(rate['achieved'])} answered"
