"""Throughput and the slowest calls against the batch size."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

from ...manifest import BatchCurve, BatchPoint
from ..numbers import number, positive
from .axes import Axis, linear, logarithmic, short
from .plot import Entry, Line, Mark, Note, Plot, Shape

HEIGHT = 250
ROW = 16.0
"""Height of the rows at the top, in pixels: one for the name of each size that was found."""

Found = Literal["best", "saturation", "largest"]
SHAPES: Mapping[Found, Shape] = {"best": "diamond", "saturation": "square", "largest": "triangle"}
"""Sizes that the search looks for, the most important first."""


def batch_plots(curve: BatchCurve) -> tuple[Plot, ...]:
    """Throughput, and below it p99, on the same scale of batch sizes; none where fewer than two sizes were timed."""
    points = sorted((point for point in curve["points"] if point["batch"] > 0), key=lambda point: point["batch"])
    timed = [point for point in points if positive(point["samples_per_s"]) and positive(point["p99_ms"])]
    if len(timed) < 2:
        return ()
    x = logarithmic([point["batch"] for point in points], 0.0, 100.0, short, base=2)
    top = ROW * len(_names(curve, timed)) + 12
    limit = positive(curve["p99_limit_ms"])
    rates = linear([point["samples_per_s"] or 0.0 for point in timed], HEIGHT - 1, top, short)
    slowest = [point["p99_ms"] or 0.0 for point in timed] + ([limit] if limit else [])
    tails = logarithmic(slowest, HEIGHT - 1, top, short)
    return _throughput(curve, points, timed, x, rates), _tail(curve, timed, x, tails, limit)


def _throughput(curve: BatchCurve, points: Sequence[BatchPoint], timed: Sequence[BatchPoint], x: Axis, y: Axis) -> Plot:
    marks = [_mark(curve, p, x.place(p["batch"]), y.place(p["samples_per_s"] or 0.0)) for p in timed]
    lines, notes = _guides(curve, timed, x)
    limit = positive(curve["p99_limit_ms"])
    words: Mapping[Found, str] = {
        "best": f"best: the highest within a p99 of {number(limit)} ms" if limit else "best: the highest",
        "saturation": "saturation: the smallest batch with 95 % of the highest",
        "largest": "largest batch that runs",
    }
    known = {point["batch"] for point in timed}
    legend = [Entry(words[name], _kind(name), shape) for name, shape in SHAPES.items() if curve[name] in known]
    if misfits := [point for point in points if not point["fits"]]:
        legend.append(Entry("does not run", "wrong", "cross"))
    crosses = [
        Mark(
            x.place(p["batch"]), HEIGHT - 8.0, "cross", "wrong", f"batch {p['batch']} does not run: {p['reason']}", 4.0
        )
        for p in misfits
    ]
    return Plot(
        caption="Throughput by batch size; higher is better",
        summary=", ".join(f"{number(p['samples_per_s'])} at batch {p['batch']}" for p in timed),
        across=_across(curve),
        up="Samples per second",
        height=HEIGHT,
        x_ticks=x.ticks,
        y_ticks=y.ticks,
        marks=(*_by_weight(marks), *crosses),
        lines=(*lines, *_joined(marks)),
        notes=notes,
        legend=tuple(legend),
    )


def _tail(curve: BatchCurve, timed: Sequence[BatchPoint], x: Axis, y: Axis, limit: float | None) -> Plot:
    marks = [_mark(curve, point, x.place(point["batch"]), y.place(point["p99_ms"] or 0.0)) for point in timed]
    lines, notes = _guides(curve, timed, x)
    bound = (Line(0.0, y.place(limit), 100.0, y.place(limit), "limit"),) if limit else ()
    return Plot(
        caption="The slowest calls by batch size: 99 of 100 take at most this long; lower is better",
        summary=", ".join(f"{number(point['p99_ms'])} ms at batch {point['batch']}" for point in timed),
        across=_across(curve),
        up="p99, ms",
        height=HEIGHT,
        x_ticks=x.ticks,
        y_ticks=y.ticks,
        marks=_by_weight(marks),
        lines=(*lines, *bound, *_joined(marks)),
        notes=notes,
        legend=(Entry(f"limit, {number(limit)} ms", "limit"),) if limit else (),
    )


def _across(curve: BatchCurve) -> str:
    return "Batch size" if curve["axis"] == "batch" else f"Batch size, axis {curve['axis']}"


def _mark(curve: BatchCurve, point: BatchPoint, x: float, y: float) -> Mark:
    found = next((name for name in SHAPES if curve[name] == point["batch"]), None)
    title = f"batch {point['batch']}: {number(point['samples_per_s'])} samples/s, p99 {number(point['p99_ms'])} ms"
    if found is None:
        return Mark(x, y, "circle", "plain", title, 4.0)
    return Mark(x, y, SHAPES[found], _kind(found), title, 6.0)


def _kind(found: Found) -> str:
    return "pick" if found == "best" else "front"


def _names(curve: BatchCurve, timed: Sequence[BatchPoint]) -> dict[int, str]:
    """The sizes that were found and can be shown, with what they are."""
    names: dict[int, list[str]] = {}
    for name in SHAPES:
        batch = curve[name]
        if batch is not None and any(point["batch"] == batch for point in timed):
            names.setdefault(batch, []).append(name)
    return {batch: ", ".join(words) for batch, words in names.items()}


def _guides(curve: BatchCurve, timed: Sequence[BatchPoint], x: Axis) -> tuple[list[Line], tuple[Note, ...]]:
    """A line down from the name of each size; each name has a row of its own, so that none covers another."""
    lines, notes = [], []
    for row, (batch, text) in enumerate(_names(curve, timed).items(), start=1):
        at = x.place(batch)
        lines.append(Line(at, row * ROW + 3, at, HEIGHT, "guide"))
        notes.append(Note(at, row * ROW, text, "end" if at > 70 else "start" if at < 30 else "middle"))
    return lines, tuple(notes)


def _joined(marks: Sequence[Mark]) -> list[Line]:
    return [Line(one.x, one.y, other.x, other.y, "line") for one, other in itertools.pairwise(marks)]


def _by_weight(marks: Sequence[Mark]) -> tuple[Mark, ...]:
    return tuple(sorted(marks, key=lambda mark: mark.kind == "plain"))
