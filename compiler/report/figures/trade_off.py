"""Accuracy against latency: all engines and trials, with the Pareto front."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ..choices import Choice, Choices
from ..numbers import error, number, positive
from .axes import logarithmic, short
from .plot import Entry, Line, Mark, Note, Plot, Shape, labelled

HEIGHT, TOP, BOTTOM = 340, 22.0, 330.0

SHAPES: dict[str, tuple[Shape, float]] = {
    "picked": ("diamond", 7.0),
    "on the front": ("circle", 5.5),
    "beaten": ("circle", 4.5),
    "not close enough": ("cross", 4.5),
}
"""How each kind of choice is drawn."""

KINDS = {"picked": "pick", "on the front": "front", "beaten": "plain", "not close enough": "wrong"}
WORDS = {
    "picked": "picked",
    "on the front": "on the Pareto front: none is better in both",
    "beaten": "another is better in both",
    "not close enough": "not close enough",
}


def trade_off_plot(choices: Choices) -> Plot | None:
    """Latency across and error up, both logarithmic; None where fewer than two choices were timed and judged."""
    points = choices.timed
    if len(points) < 2:
        return None
    errors = [known for point in points if (known := positive(point.error))]
    floor = min(errors, default=1e-7) / 3
    exact = any(not point.error for point in points)
    bounds = [known for known in (choices.bound, *([floor] if exact else ())) if positive(known)]
    y = logarithmic([*errors, *bounds] or [floor], BOTTOM, TOP, short)
    baseline = positive(choices.baseline_ms)
    x = logarithmic([*(point.p50_ms for point in points), *([baseline] if baseline else ())], 0.0, 100.0, short)

    def mark(point: Choice) -> Mark:
        shape, size = SHAPES[point.state]
        title = f"{point.number}: {point.name}, {number(point.p50_ms)} ms, error {error(point.error)}, {point.state}"
        place = y.place(positive(point.error) or floor)
        # The stair leaves a point of the front upwards and to the right.
        toward = 3 * math.pi / 4 if point.front else -math.pi / 4
        return Mark(x.place(point.p50_ms), place, shape, KINDS[point.state], title, size, str(point.number), toward)

    order = sorted(points, key=lambda point: list(SHAPES).index(point.state))
    lines = _stairs([mark(point) for point in points if point.front])
    notes: list[Note] = []
    legend = [Entry(WORDS[state], KINDS[state], shape) for state, (shape, _) in SHAPES.items() if _has(points, state)]
    if bound := positive(choices.bound):
        lines.append(Line(0.0, y.place(bound), 100.0, y.place(bound), "limit"))
        legend.append(Entry(f"budget, {choices.budget}", "limit"))
    if baseline:
        lines.append(Line(x.place(baseline), 0.0, x.place(baseline), HEIGHT, "guide"))
        right = x.place(baseline) > 50
        at = x.place(baseline) + (-1 if right else 1)
        notes.append(Note(at, 12.0, choices.baseline, "end" if right else "start"))
    front = ", ".join(point.name for point in points if point.front)
    return Plot(
        caption=f"Error against latency{choices.where}; further down and to the left is better",
        summary=f"On the Pareto front, the fastest first: {front}." if front else "None is close enough.",
        across="Latency, p50 in ms",
        up="Relative L2",
        height=HEIGHT,
        x_ticks=x.ticks,
        y_ticks=y.ticks,
        marks=labelled([mark(point) for point in order], notes, HEIGHT),
        lines=tuple(lines),
        notes=tuple(notes),
        legend=tuple(legend),
    )


def _stairs(front: Sequence[Mark]) -> list[Line]:
    """From each point of the front straight to the right, and down to the next: what lies above is beaten."""
    lines = []
    if front:
        lines.append(Line(front[0].x, 0.0, front[0].x, front[0].y, "front"))
    for one, other in itertools.pairwise(front):
        lines.append(Line(one.x, one.y, other.x, one.y, "front"))
        lines.append(Line(other.x, one.y, other.x, other.y, "front"))
    if front:
        lines.append(Line(front[-1].x, front[-1].y, 100.0, front[-1].y, "front"))
    return lines


def _has(points: Sequence[Choice], state: str) -> bool:
    return any(point.state == state for point in points)
