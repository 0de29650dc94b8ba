"""Finds rotary embedding: pairs of channels that are turned by angles, which the position of a token alone decides.

    y = x * cos(a) + h(x) * sin(a)      halves       h([x1, x2]) = [-x2, x1], the angles of both halves are the same
                                        interleaved  h([x1, x2, x3, x4, ...]) = [-x2, x1, -x4, x3, ...]

Where only the first channels are turned, the others are joined to them. What the graph computes angles from is not
read: the cosines and sines of all positions are computed by the graph's own nodes, scaling and all.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...errors import GraphError
from ..graph import Graph
from ..graph.editing import is_constant
from ..graph.probe import run
from ..quantization.patch import Attributes, Patcher
from .parts import Part, part
from .patterns import integers, is_last, pairs, producer, rank, size

_SAME = 1e-6
"""By how much a cosine may differ between two calls, or between the two channels of a pair."""


@dataclasses.dataclass(frozen=True)
class Rotary:
    """A tensor whose first `turned` channels are turned.

    Attributes:
        x: before, (batch, heads, time, width).
        cos, sin: of each channel, (batch, 1, time, turned).
        interleaved: whether a pair stands side by side.
    """

    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    interleaved: bool
    turned: int


class Table(NamedTuple):
    """Cosines and sines of all positions as constants, (positions, pairs).

    Attributes:
        positions: of the new tokens, (batch, time), int64.
    """

    positions: ir.Value
    cos: ir.Value
    sin: ir.Value


def rotary(value: ir.Value | None) -> Rotary | None:
    """Reads a turned tensor (batch, heads, time, width); None where it is none."""
    if rank(value) != 4:
        return None
    whole = _turned(value)
    if whole is not None:
        return whole
    joined = producer(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or not is_last(joined.attributes.get_int("axis", 0), value):
        return None
    found, rest = _turned(joined.inputs[0]), part(joined.inputs[1])
    first = None if found is None else part(found.x)
    if found is None or first is None or rest is None or first.x is not rest.x:
        return None
    if (first.start, first.stop, rest.start, rest.stop) != (0, found.turned, found.turned, size(value, -1)):
        return None
    return dataclasses.replace(found, x=first.x)


def _turned(value: ir.Value | None) -> Rotary | None:
    width = size(value, -1)
    if width is None or width % 2:
        return None
    for plain, crossed in pairs(producer(value, "Add")):
        for x, cos in pairs(producer(plain, "Mul")):
            for other, sin in pairs(producer(crossed, "Mul")):
                if any(rank(one) != 4 or size(one, 1) != 1 or size(one, 3) != width for one in (cos, sin)):
                    continue
                interleaved = _crossed(other, x, width)
                if interleaved is not None:
                    return Rotary(x, cos, sin, interleaved, width)
    return None


def _crossed(value: ir.Value, x: ir.Value, width: int) -> bool | None:
    """Whether a value is h(x) with interleaved pairs, or with halves; None where it is neither."""
    halves = producer(value, "Concat")
    if halves is not None and len(halves.inputs) == 2 and is_last(halves.attributes.get_int("axis", 0), value):
        return False if _is_swapped(halves, x, (width // 2, width, 1), (0, width // 2, 1)) else None
    flat = producer(value, "Reshape")
    stacked = producer(flat.inputs[0], "Concat") if flat is not None else None
    if stacked is None or len(stacked.inputs) != 2 or size(stacked.outputs[0], -1) != 2:
        return None
    return True if _is_swapped(stacked, x, (1, width, 2), (0, width, 2)) else None


def _is_swapped(concat: ir.Node, x: ir.Value, second: tuple[int, int, int], first: tuple[int, int, int]) -> bool:
    """Whether [-second, first] is joined of these parts of x."""
    left, right = (_unwidened(value) for value in concat.inputs)
    negated = producer(left, "Neg")
    if negated is None:
        return False
    found = [part(_unwidened(value)) for value in (negated.inputs[0], right)]
    return found == [Part(x, *second), Part(x, *first)]


def _unwidened(value: ir.Value | None) -> ir.Value | None:
    """A value before an axis was added behind it."""
    node = producer(value, "Unsqueeze")
    if node is None or integers(node.inputs[1]) not in ((-1,), ((rank(value) or 0) - 1,)):
        return value
    return node.inputs[0]


def attributes(*, interleaved: bool, turned: int, heads: int, width: int) -> Attributes:
    """Those of a RotaryEmbedding that turns so many channels of each head."""
    part_of = {"num_heads": heads, "rotary_embedding_dim": turned} if turned < width else {}
    return {"interleaved": int(interleaved), **part_of}


class Tables:
    """Makes the tables of rotary embeddings, of those that layers share once."""

    def __init__(self, patcher: Patcher) -> None:
        self._patcher = patcher
        self._made: dict[tuple[ir.Value, ir.Value, bool], Table | str] = {}

    def table(self, found: Rotary, places: ir.Value, entries: int | None, positions: int | None) -> Table | str:
        """The table of an embedding, or why there is none.

        Args:
            places: of the new tokens in the cache (batch, time), and `entries` how many the cache holds.
            positions: how many a text has, where other than places in the cache decide.
        """
        key = (found.cos, found.sin, found.interleaved)
        if key not in self._made:
            self._made[key] = self._table(found, places, entries, positions)
        return self._made[key]

    def _table(self, found: Rotary, places: ir.Value, entries: int | None, positions: int | None) -> Table | str:
        source = _source((found.cos, found.sin))
        if source is None:
            return "its angles are computed from something else than positions"
        length = entries if source is places else positions
        if length is None:
            return "its angles are computed from positions that have no known end"
        angles = _Angles(self._patcher.graph, source, (found.cos, found.sin))
        try:
            arrays = angles.all(length, interleaved=found.interleaved)
        except GraphError as error:
            return f"its angles cannot be computed by themselves: {error.found or error}"
        if arrays is None:
            return "its angles are not those of pairs, one for each position"
        name = source.name or "positions"
        return Table(source, *(self._patcher.initializer(f"{name}/{kind}", arrays[kind]) for kind in ("cos", "sin")))


class _Angles:
    """The nodes between positions and cosines and sines, to be run by themselves."""

    def __init__(self, graph: Graph, source: ir.Value, values: tuple[ir.Value, ir.Value]) -> None:
        model = graph.model
        part = ir.convenience.extract(model.graph, [source], list(values))
        self._graph = Graph(ir.Model(part, ir_version=model.ir_version))
        self._name = source.name or ""

    def all(self, length: int, *, interleaved: bool) -> dict[str, np.ndarray] | None:
        """Those of all positions, (length, pairs); None where positions by themselves do not decide."""
        tables = [array[0, 0] for array in self._run(np.arange(length))]
        for some in (np.arange(length // 2, length), np.arange(max(length // 2, 1))[::-1]):
            for table, again in zip(tables, self._run(some), strict=True):
                if not np.allclose(again[0, 0], table[some], atol=_SAME):
                    return None
        found = {}
        for kind, table in zip(("cos", "sin"), tables, strict=True):
            half = table.shape[1] // 2
            both = (table[:, ::2], table[:, 1::2]) if interleaved else (table[:, :half], table[:, half:])
            if not np.allclose(*both, atol=_SAME):
                return None
            found[kind] = np.ascontiguousarray(both[0])
        return found

    def _run(self, positions: np.ndarray) -> list[np.ndarray]:
        return list(run(self._graph, {self._name: positions[None]}).values())


def _source(values: tuple[ir.Value, ...]) -> ir.Value | None:
    """The positions (batch, time) that alone decide these values."""
    pending: list[ir.Value | None] = list(values)
    seen: set[ir.Value] = set()
    found: set[ir.Value] = set()
    while pending:
        value = pending.pop()
        if value is None or value in seen or is_constant(value):
            continue
        seen.add(value)
        node = value.producer()
        if value.dtype == ir.DataType.INT64 and rank(value) == 2:
            found.add(value)
        elif node is None:
            return None
        else:
            pending += node.inputs
    return found.pop() if len(found) == 1 else None
