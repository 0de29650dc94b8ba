"""Cuts rows into shards: always the same ones for the same data, whoever computes them and wherever it begins.

A shard ends after `shard_rows` rows, and where the shape of a row changes, as its outputs stack to one array.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, Literal

from ..errors import DataError
from .layout import Layout
from .parts import Part
from .source import Source, part_of

BadRows = Literal["stop", "skip", "run"]
"""What becomes of rows that do not fit or are not finite; "run" leaves those that are not finite to the engine."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows of a part that lie in one shard. `problem` says why none of the part's rows fits the model."""

    shard: int
    part: Part
    start: int
    stop: int
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        """For another process."""
        return {"place": self.part.place(self.start), "rows": [self.start, self.stop], "problem": self.problem}

    @classmethod
    def from_json(cls, shard: int, value: dict[str, Any]) -> Piece:
        """The inverse of `to_json`."""
        start, stop = value["rows"]
        return cls(shard, part_of(**value["place"]), start, stop, value["problem"])


def pieces(parts: Iterable[Part], layout: Layout, shard_rows: int) -> Iterator[Piece]:
    """The pieces of all shards in order.

    Raises:
        DataError: a part has no rows that can be counted.
    """
    shard, room, last = 0, shard_rows, None
    for part in parts:
        rows, problem = layout.rows(part), layout.problem(part)
        if not rows:
            continue
        key: Hashable = layout.key(part) if problem is None or not layout.varying else "problem"
        if key != last and room < shard_rows:
            shard, room = shard + 1, shard_rows
        start, last = 0, key
        while start < rows:
            stop = min(start + room, rows)
            yield Piece(shard, part, start, stop, problem.message if problem else "")
            room -= stop - start
            start = stop
            if not room:
                shard, room = shard + 1, shard_rows


def tasks(every: Iterable[Piece]) -> Iterator[tuple[int, list[Piece]]]:
    """The pieces of each shard, for parts that are read in place."""
    for shard, group in itertools.groupby(every, key=lambda piece: piece.shard):
        yield shard, list(group)


def survey(source: Source, layout: Layout, bad: BadRows) -> int | None:
    """Rows of all files, from their headers; None where only reading tells.

    Raises:
        DataError: there are none, none fits, or one does not and that is to stop the run.
    """
    if not source.files:
        return None
    rows, fitting, first = 0, 0, None
    for part in source.parts():
        count, problem = layout.rows(part), layout.problem(part)
        rows += count
        if problem is None:
            fitting += count
        elif bad != "skip":
            raise named(problem, part.name, hint="--bad-rows skip goes on without such rows, and says which they are")
        first = first or (named(problem, part.name) if problem else None)
    if first is not None and not fitting:
        raise first
    if not rows:
        raise DataError(f"{source.description} holds no rows", expected="at least one", found="none")
    return rows


def named(error: DataError, where: str, *, hint: str | None = None) -> DataError:
    """The error with the place where it is."""
    return DataError(f"{where}: {error.message}", expected=error.expected, found=error.found, hint=error.hint or hint)
