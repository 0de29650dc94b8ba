"""What a plot on two axes is made of. `x` is in percent of the drawing's width and `y` in pixels from its top, so that
text and marks keep their size on every screen.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

from .axes import Tick

WIDTHS = (270, 480, 760, 1010)
"""Widths of the drawing, in pixels, at which labels must not cover each other: of a phone's up to the page's."""

LETTER, LINE = 7.0, 13.0
"""Width of a digit and height of a line of a label, in pixels."""

Shape = Literal["circle", "square", "triangle", "diamond", "cross"]
Anchor = Literal["start", "middle", "end"]


@dataclasses.dataclass(frozen=True)
class Label:
    """A number beside its mark, `dx` and `dy` pixels away; `leader` tells whether a line has to lead to it."""

    text: str
    dx: float
    dy: float
    leader: bool


@dataclasses.dataclass(frozen=True)
class Mark:
    """A point. `kind` is how it is coloured, `size` half of its extent in pixels, `title` what it says in words.

    `number` is its row in the table beside, and `toward` the direction in which it should stand, in radians clockwise
    from the right; `label` is where it stands, None where there is no room.
    """

    x: float
    y: float
    shape: Shape
    kind: str
    title: str = ""
    size: float = 5.0
    number: str = ""
    toward: float = 0.0
    label: Label | None = None

    @property
    def path(self) -> str:
        """The outline around the mark's place, as data of an SVG path."""
        return outline(self.shape, self.size)


@dataclasses.dataclass(frozen=True)
class Line:
    """A straight line; `kind` is how it is drawn."""

    x1: float
    y1: float
    x2: float
    y2: float
    kind: str


@dataclasses.dataclass(frozen=True)
class Note:
    """Words within the drawing."""

    x: float
    y: float
    text: str
    anchor: Anchor = "start"


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a mark or a line means; one without a shape is a line."""

    text: str
    kind: str
    shape: Shape | None = None

    @property
    def path(self) -> str:
        """The mark, at the size of the others."""
        return outline(self.shape, 5.5) if self.shape else "M-8,0H8"


@dataclasses.dataclass(frozen=True)
class Plot:
    """A drawing with its axes; `summary` says what is to be seen. The marks that matter most come first."""

    caption: str
    summary: str
    across: str
    up: str
    height: int
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    lines: tuple[Line, ...] = ()
    notes: tuple[Note, ...] = ()
    legend: tuple[Entry, ...] = ()


def outline(shape: Shape, size: float) -> str:
    """A shape around (0, 0) as data of an SVG path; all cover about the same area."""
    s = round(size, 1)
    if shape == "circle":
        return f"M{-s},0a{s},{s} 0 1,0 {2 * s},0a{s},{s} 0 1,0 {-2 * s},0z"
    if shape == "square":
        s = round(size * 0.89, 1)
        return f"M{-s},{-s}H{s}V{s}H{-s}z"
    if shape == "triangle":
        s = round(size * 1.25, 1)
        return f"M0,{-s}L{s},{round(0.8 * s, 1)}H{-s}z"
    if shape == "diamond":
        s = round(size * 1.25, 1)
        return f"M0,{-s}L{s},0L0,{s}L{-s},0z"
    return f"M{-s},{-s}L{s},{s}M{s},{-s}L{-s},{s}"


Box = tuple[float, float, float, float]


def labelled(marks: Sequence[Mark], notes: Sequence[Note], height: int) -> tuple[Mark, ...]:
    """Gives the marks that have a number a place for it that covers no mark, no note and no other number, at any width.

    The first marks choose first. A number that finds no room close to its mark is led to by a line.
    """
    placed: list[tuple[Mark, Label]] = []
    found = []
    for mark in marks:
        label = next((label for label in _places(mark) if _is_free(mark, label, (marks, notes, placed), height)), None)
        found.append(dataclasses.replace(mark, label=label))
        if label:
            placed.append((mark, label))
    return tuple(found)


def _places(mark: Mark) -> Iterator[Label]:
    """Where the number of a mark might stand, the closest first, on rings around it."""
    width = LETTER * len(mark.number)
    turns = sorted(range(-7, 9), key=lambda turn: (abs(turn), turn))
    for ring, turn in itertools.product((2.0, 12.0, 24.0, 38.0, 54.0), turns) if mark.number else ():
        angle = mark.toward + math.pi * turn / 8
        reach = mark.size + ring
        dx = math.cos(angle) * (reach + width / 2)
        dy = math.sin(angle) * (reach + LINE / 2)
        yield Label(mark.number, round(dx, 1), round(dy, 1), leader=ring > 2)


def _is_free(
    mark: Mark,
    label: Label,
    others: tuple[Sequence[Mark], Sequence[Note], Sequence[tuple[Mark, Label]]],
    height: int,
) -> bool:
    marks, notes, placed = others
    for width in WIDTHS:
        box = _label_box(mark, label, width)
        if box[0] < 0 or box[2] > width or box[1] < 0 or box[3] > height:
            return False
        if any(_overlap(box, _mark_box(other, width)) for other in marks):
            return False
        if any(_overlap(box, _note_box(note, width)) for note in notes):
            return False
        if any(_overlap(box, _label_box(other, taken, width)) for other, taken in placed):
            return False
    return True


def _label_box(mark: Mark, label: Label, width: int) -> Box:
    x, y, half = mark.x / 100 * width + label.dx, mark.y + label.dy, LETTER * len(label.text) / 2
    return x - half, y - LINE / 2, x + half, y + LINE / 2


def _mark_box(mark: Mark, width: int) -> Box:
    x, extent = mark.x / 100 * width, mark.size * 0.8
    return x - extent, mark.y - extent, x + extent, mark.y + extent


def _note_box(note: Note, width: int) -> Box:
    x, length = note.x / 100 * width, LETTER * len(note.text)
    left = x - {"start": 0.0, "middle": length / 2, "end": length}[note.anchor]
    return left, note.y - LINE, left + length, note.y + 3


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
