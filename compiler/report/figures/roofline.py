"""The roofline: how fast each node computes, below what the machine can do at that intensity."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...manifest import Bound, Roofline, RooflineNode
from ..numbers import number, positive, share
from .axes import Axis, logarithmic, short
from .plot import Entry, Line, Mark, Note, Plot, Shape, labelled

HEIGHT, TOP, BOTTOM = 380, 20.0, 370.0

NUMBERED = 8
"""How many nodes carry their number, those that take most time."""

SHAPES: Mapping[Bound, Shape] = {
    "compute": "circle",
    "bandwidth": "square",
    "launch": "triangle",
    "cpu-placed": "diamond",
    "transfer": "cross",
}
BOUNDS: Mapping[str, str] = {
    "compute": "arithmetic",
    "bandwidth": "memory bandwidth",
    "launch": "the launch of its kernel",
    "cpu-placed": "the CPU, where it was placed",
    "transfer": "copies between devices",
}
"""What limits a node, in words."""


def ranked(roofline: Roofline) -> list[tuple[int, RooflineNode]]:
    """The nodes with their numbers, those that take most time first."""
    return list(enumerate(sorted(roofline["nodes"], key=lambda node: -(positive(node["share"]) or 0.0)), start=1))


def roofline_plot(roofline: Roofline) -> Plot | None:
    """None where the ceilings are not known, or no node that computes was timed."""
    peak, bandwidth = positive(roofline["peak_gflops"]), positive(roofline["bandwidth_gb_s"])
    nodes = [(rank, node) for rank, node in ranked(roofline) if is_drawn(node)]
    if peak is None or bandwidth is None or not nodes:
        return None
    ridge = peak / bandwidth
    intensities = [node["flops"] / node["bytes"] for _, node in nodes]
    rates = [node["flops"] / node["ms"] / 1e6 for _, node in nodes]
    x = logarithmic([min(ridge / 4, *intensities), max(ridge * 4, *intensities)], 0.0, 100.0, short)
    y = logarithmic([min([*rates, peak / 4]), max(*rates, peak)], BOTTOM, TOP, short)
    marks = [
        _mark(rank, node, x.place(intensity), y.place(rate))
        for (rank, node), intensity, rate in zip(nodes, intensities, rates, strict=True)
    ]
    top = ", ".join(f"{rank} {node['name']} ({share(node['share'])})" for rank, node in nodes[:3])
    notes = _names(x, y, peak, bandwidth)
    found = {node["bound"] for _, node in nodes}
    return Plot(
        caption="Speed of each node against its intensity; the larger a mark, the more of the time it takes",
        summary=f"Most time is taken by {top}.",
        across="Intensity, FLOP per byte moved",
        up="Speed, GFLOP/s",
        height=HEIGHT,
        x_ticks=x.ticks,
        y_ticks=y.ticks,
        marks=labelled(marks, notes, HEIGHT),
        lines=_ceilings(x, y, peak, bandwidth),
        notes=notes,
        legend=(
            *(Entry(f"limited by {BOUNDS[bound]}", bound, shape) for bound, shape in SHAPES.items() if bound in found),
            Entry("what this machine can do, measured", "ceiling"),
        ),
    )


def is_drawn(node: RooflineNode) -> bool:
    """Whether a node computes something and was timed; all others have no place on logarithmic axes."""
    return all(positive(value) for value in (node["flops"], node["bytes"], node["ms"]))


def _mark(rank: int, node: RooflineNode, x: float, y: float) -> Mark:
    part = min(1.0, positive(node["share"]) or 0.0)
    title = f"{rank}: {node['operator']} {node['name']}, {share(node['share'])} of the time, {node['bound']}"
    number_ = str(rank) if rank <= NUMBERED else ""
    return Mark(
        x, y, SHAPES.get(node["bound"], "cross"), node["bound"], title, round(3 + 17 * math.sqrt(part), 1), number_
    )


def _ceilings(x: Axis, y: Axis, peak: float, bandwidth: float) -> tuple[Line, ...]:
    """From the left edge, or from where the slope enters the drawing, up to the ridge, and flat from there."""
    begin = max(x.low, y.low / bandwidth)
    ridge = x.place(peak / bandwidth)
    return (
        Line(x.place(begin), y.place(begin * bandwidth), ridge, y.place(peak), "ceiling"),
        Line(ridge, y.place(peak), 100.0, y.place(peak), "ceiling"),
    )


def _names(x: Axis, y: Axis, peak: float, bandwidth: float) -> tuple[Note, ...]:
    """What the ceilings are: of arithmetic above its right end, of memory to the left of the slope, near its top."""
    begin, ridge = max(x.low, y.low / bandwidth), peak / bandwidth
    near = begin ** (1 / 3) * ridge ** (2 / 3)
    return (
        Note(99.0, y.place(peak) - 6, f"{number(peak)} GFLOP/s", "end"),
        Note(x.place(near) - 1, y.place(near * bandwidth) - 4, f"{number(bandwidth)} GB/s", "end"),
    )
