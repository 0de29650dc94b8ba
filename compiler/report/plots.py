"""Scatter and line plots: geometry in percent of the width and pixels of the height, drawn as SVG by the templates.

latency against accuracy   with the Pareto front: engines that no other one beats in both
batch size                 against throughput and against p99
roofline                   FLOP per byte against GFLOP/s, below what the machine can do
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from ..manifest import BatchCurve, Ladder, Manifest, Roofline
from .numbers import error, number, share

HEIGHT = 280
TOP, BOTTOM = 14, 26
"""Pixels above the highest value and below the lowest, where the labels of the other axis stand."""
LEFT, RIGHT = 7.0, 98.0
"""Percent of the width between which values lie."""

LABELLED = 5
"""Nodes of a roofline that carry their number, the most expensive first."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """A point; `kind` is how it is drawn, `label` a number that the table explains, `title` says it in words."""

    x: float
    y: float
    kind: str
    label: str = ""
    title: str = ""
    radius: float = 5.0


@dataclasses.dataclass(frozen=True)
class Line:
    """A segment; `kind` is how it is drawn."""

    x1: float
    y1: float
    x2: float
    y2: float
    kind: str = "line"


@dataclasses.dataclass(frozen=True)
class Tick:
    """A value on an axis: its place and its label."""

    at: float
    label: str


@dataclasses.dataclass(frozen=True)
class Plot:
    """What a template draws; `summary` says what is to be seen, for those who do not see it."""

    caption: str
    summary: str
    across: str
    up: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    lines: tuple[Line, ...] = ()
    height: int = HEIGHT


@dataclasses.dataclass(frozen=True)
class Point:
    """One engine or trial by its latency and its error."""

    name: str
    p50_ms: float
    relative_l2: float
    kept: bool
    pareto: bool = False


Place = Callable[[float], float]


def trade_off(manifest: Manifest) -> tuple[Point, ...]:
    """All engines and trials that were both timed and judged, the fastest first; each name once."""
    ladder, benchmark = manifest.get("ladder"), manifest["benchmark"]
    picks = set(ladder["picks"].values()) if ladder else set()
    found: dict[str, tuple[float, float]] = {}
    for step in ladder["steps"] if ladder else ():
        if _positive(step["p50_ms"]) and step["relative_l2"] is not None:
            found[step["candidate"]] = (step["p50_ms"] or 0.0, step["relative_l2"])
    sizes = {name: axis["opt"] for name, axis in manifest["signature"].get("axes", {}).items()}
    times = {t["candidate"]: t["p50_ms"] for t in (benchmark["timings"] if benchmark else ()) if t["sizes"] == sizes}
    for engine in manifest["engines"]:
        errors = [o["relative_l2"] for o in engine["validation"]["outputs"]] if engine["validation"] else []
        if errors and None not in errors and _positive(times.get(engine["name"])):
            found[engine["name"]] = (times[engine["name"]], max(e for e in errors if e is not None))
    points, best = [], math.inf
    for name, (p50_ms, l2) in sorted(found.items(), key=lambda item: item[1]):
        if not math.isfinite(l2):
            continue
        points.append(Point(name, p50_ms, l2, name in picks, pareto=l2 < best))
        best = min(best, l2)
    return tuple(points)


def trade_off_plot(points: Sequence[Point], budget: float | None = None) -> Plot:
    """Latency across, error up, both logarithmic; the Pareto front as a stair.

    Args:
        budget: a bound on the error to draw as a line.
    """
    floor = min([p.relative_l2 for p in points if p.relative_l2 > 0], default=1e-7) / 2
    errors = [max(p.relative_l2, floor) for p in points] + ([budget] if budget else [])
    x, x_ticks = _logarithmic([p.p50_ms for p in points], LEFT, RIGHT, lambda v: f"{number(v)} ms")
    y, y_ticks = _logarithmic(errors, HEIGHT - BOTTOM, TOP, error)
    marks = tuple(
        Mark(
            x(p.p50_ms),
            y(max(p.relative_l2, floor)),
            "pick" if p.kept else "front" if p.pareto else "point",
            str(index),
            f"{p.name}: {number(p.p50_ms)} ms, relative error {error(p.relative_l2)}",
        )
        for index, p in enumerate(points, start=1)
    )
    front = [mark for mark, point in zip(marks, points, strict=True) if point.pareto]
    lines = [Line(a.x, a.y, b.x, a.y, "front") for a, b in itertools.pairwise(front)]
    lines += [Line(b.x, a.y, b.x, b.y, "front") for a, b in itertools.pairwise(front)]
    if budget:
        lines.append(Line(LEFT, y(budget), RIGHT, y(budget), "limit"))
    names = ", ".join(p.name for p in points if p.pareto)
    return Plot(
        "Error against latency; lower and further left is better",
        f"On the Pareto front: {names}.",
        "latency (p50)",
        "Relative error",
        x_ticks,
        y_ticks,
        marks,
        tuple(lines),
    )


def batch_plots(curve: BatchCurve) -> tuple[Plot, ...]:
    """Throughput and p99 against the batch size; none where fewer than two sizes were timed."""
    points = [p for p in curve["points"] if p["fits"] and _positive(p["samples_per_s"]) and _positive(p["p99_ms"])]
    if len(points) < 2:
        return ()
    x, x_ticks = _logarithmic([p["batch"] for p in points], LEFT, RIGHT, lambda v: number(int(v)), base=2)
    marked = {curve["saturation"]: ("front", "saturated"), curve["best"]: ("pick", "best")}

    def plot(key: Literal["samples_per_s", "p99_ms"], caption: str, up: str, limit: float | None) -> Plot:
        values = [float(p[key] or 0.0) for p in points]
        y, y_ticks = _linear([*values, *([limit] if limit else [])], HEIGHT - BOTTOM, TOP)
        marks = tuple(
            Mark(x(p["batch"]), y(v), *marked.get(p["batch"], ("point", "")), f"batch {p['batch']}: {number(v)}")
            for p, v in zip(points, values, strict=True)
        )
        lines = tuple(Line(a.x, a.y, b.x, b.y) for a, b in itertools.pairwise(marks))
        if limit:
            lines += (Line(LEFT, y(limit), RIGHT, y(limit), "limit"),)
        return Plot(caption, _batches_in_words(curve), "batch size", up, x_ticks, y_ticks, marks, lines)

    return (
        plot("samples_per_s", "Throughput by batch size; higher is better", "Samples per second", None),
        plot("p99_ms", "Slowest hundredth of the calls; lower is better", "p99, ms", curve["p99_limit_ms"]),
    )


def _batches_in_words(curve: BatchCurve) -> str:
    limit = "the engine's limit" if curve["largest_is_limit"] else "the largest that fits in memory"
    return f"Batch {curve['largest']} is {limit}; {curve['saturation']} reaches 95 % of the highest throughput."


def roofline_plot(roofline: Roofline) -> Plot | None:
    """Nodes below the ceilings of the machine; None where no node computes anything that was timed."""
    nodes = [n for n in roofline["nodes"] if _positive(n["ms"]) and _positive(n["flops"]) and _positive(n["bytes"])]
    peak, bandwidth = roofline["peak_gflops"], roofline["bandwidth_gb_s"]
    if not nodes or not _positive(peak) or not _positive(bandwidth):
        return None
    intensities = [node["flops"] / node["bytes"] for node in nodes]
    rates = [node["flops"] / (node["ms"] * 1e6) for node in nodes]
    ridge = peak / bandwidth
    low, high = min([*intensities, ridge]) / 2, max([*intensities, ridge]) * 2
    x, x_ticks = _logarithmic([low, high], LEFT, RIGHT, number)
    y, y_ticks = _logarithmic([*rates, peak, low * bandwidth], HEIGHT - BOTTOM, TOP, number)
    order = sorted(range(len(nodes)), key=lambda index: -nodes[index]["share"])
    rank = {index: place for place, index in enumerate(order, start=1)}
    marks = tuple(
        Mark(
            x(intensities[i]),
            y(rates[i]),
            node["bound"],
            str(rank[i]) if rank[i] <= LABELLED else "",
            f"{node['operator']} {node['name']}: {share(node['share'])} of the time, {node['bound']}-bound",
            round(3 + 14 * math.sqrt(max(0.0, min(1.0, node["share"]))), 1),
        )
        for i, node in enumerate(nodes)
    )
    lines = (
        Line(x(low), y(low * bandwidth), x(ridge), y(peak), "limit"),
        Line(x(ridge), y(peak), x(high), y(peak), "limit"),
    )
    return Plot(
        "Nodes below what this machine can do; the larger, the more time",
        f"Ceilings: {number(peak)} GFLOP/s and {number(bandwidth)} GB/s, which meet at {number(ridge)} FLOP per byte.",
        "FLOP per byte",
        "GFLOP/s",
        x_ticks,
        y_ticks,
        marks,
        lines,
    )


def _logarithmic(
    values: Sequence[float], start: float, end: float, label: Callable[[float], str], base: int = 10
) -> tuple[Place, tuple[Tick, ...]]:
    """Where values stand between two places, and ticks: powers of the base, or the ends where there is one."""
    low, high = math.log(min(values), base), math.log(max(values), base)
    margin = max(0.05 * (high - low), 0.02 if high > low else 0.5)
    low, high = low - margin, high + margin

    def place(value: float) -> float:
        return round(start + (math.log(value, base) - low) / (high - low) * (end - start), 2)

    powers = [float(base) ** power for power in range(math.ceil(low), math.floor(high) + 1)]
    thinned = powers[:: max(1, math.ceil(len(powers) / 9))]
    ticks = thinned if len(thinned) > 1 else sorted({min(values), max(values)})
    return place, tuple(Tick(place(value), label(value)) for value in ticks)


def _linear(values: Sequence[float], start: float, end: float) -> tuple[Place, tuple[Tick, ...]]:
    """The same from zero, with at most six round ticks."""
    top = max(values) * 1.05 or 1.0
    step = 10 ** math.floor(math.log10(top / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if top / (step * factor) <= 6)

    def place(value: float) -> float:
        return round(start + value / top * (end - start), 2)

    ticks = [step * index for index in range(int(top / step) + 1)]
    return place, tuple(Tick(place(value), number(value)) for value in ticks)


def _positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def budget_of(ladder: Ladder | None) -> float | None:
    """The bound on the relative error that the user gave; None where the budget is on something else."""
    texts = [step["budget"]["text"] for step in ladder["steps"] if step["budget"]] if ladder else []
    kind, _, bound = texts[0].partition("=") if texts else ("", "", "")
    return float(bound) if kind == "relative_l2" else None


def ranked(roofline: Roofline) -> list[Mapping[str, object]]:
    """The nodes, the most expensive first, numbered as in the plot."""
    nodes = sorted(roofline["nodes"], key=lambda node: -node["share"])
    return [{"rank": rank, **node} for rank, node in enumerate(nodes, start=1)]
