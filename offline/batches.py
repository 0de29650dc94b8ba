"""Reads the rows of shards and makes batches of them, with bad rows found and small batches padded."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import DataError
from .layout import Layout
from .parts import Arrays, Part, Rows
from .plan import BadRows, Piece


@dataclasses.dataclass(frozen=True)
class Failure:
    """Rows of a file that gave no outputs."""

    file: str
    start: int
    stop: int
    reason: str

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {"file": self.file, "rows": [self.start, self.stop], "reason": self.reason}


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs of one call.

    Attributes:
        inputs: as the engine takes them; rows that failed are zero, and beyond `rows` is padding.
        kept: arrays of the data that are handed on, unpadded.
        failed: numbers of the rows that failed.
        last: whether it is the last of its shard.
        digest: SHA-256 of the shard's inputs up to here; empty where nobody asked for it.
    """

    shard: int
    rows: int
    inputs: Arrays
    kept: Arrays
    failed: tuple[int, ...]
    failures: tuple[Failure, ...]
    last: bool
    digest: str


@dataclasses.dataclass(frozen=True)
class _Chunk:
    arrays: Arrays
    kept: Arrays
    rows: int
    problems: Mapping[int, str]
    part: str
    start: int


class Reader:
    """Makes batches of pieces.

    Args:
        batch: rows of a batch.
        hashed: whether to compute the digests.
    """

    def __init__(self, layout: Layout, batch: int, bad: BadRows, *, hashed: bool = False) -> None:
        self._layout = layout
        self._batch = batch
        self._bad = bad
        self._hashed = hashed
        self._open: Part | None = None

    def batches(self, every: Iterable[Piece]) -> Iterator[Batch]:
        """The batches of all shards in order; no batch has rows of two.

        Raises:
            DataError: a part cannot be read, or a row is bad and that is to stop the run.
        """
        try:
            for shard, group in itertools.groupby(every, key=lambda piece: piece.shard):
                yield from self._shard(shard, group)
        finally:
            self._switch(None)

    def _shard(self, shard: int, group: Iterable[Piece]) -> Iterator[Batch]:
        digest = hashlib.sha256() if self._hashed else None
        made: Batch | None = None
        for chunks in self._gathered(group):
            if made is not None:
                yield made
            made = self._made(shard, chunks, digest)
        if made is not None:
            yield dataclasses.replace(made, last=True)

    def _gathered(self, group: Iterable[Piece]) -> Iterator[list[_Chunk]]:
        chunks: list[_Chunk] = []
        room = self._batch
        for piece in group:
            self._switch(piece.part)
            start = piece.start
            while start < piece.stop:
                stop = min(start + room, piece.stop)
                chunks.append(self._read(piece, start, stop))
                room -= stop - start
                start = stop
                if not room:
                    yield chunks
                    chunks, room = [], self._batch
        if chunks:
            yield chunks

    def _switch(self, part: Part | None) -> None:
        if self._open is not None and self._open is not part:
            self._open.close()
        self._open = part

    def _read(self, piece: Piece, start: int, stop: int) -> _Chunk:
        layout, part, count = self._layout, piece.part, stop - start
        if piece.problem:
            self._refuse(f"{part.name}: {piece.problem}")
            read = Rows(self._blank(count), dict.fromkeys(range(count), piece.problem))
            kept = part.read(start, stop, layout.keep, ()).arrays if layout.keep else {}
        else:
            read = part.read(start, stop, (*layout.stacked, *layout.keep), layout.shared)
            kept = {name: read.arrays[name] for name in layout.keep}
        inputs = {name: array for name, array in read.arrays.items() if name not in layout.keep}
        problems = dict(read.problems)
        if self._bad != "run" and not piece.problem:
            problems |= self._not_finite(inputs, count, problems)
        for row, reason in sorted(problems.items())[:1]:
            self._refuse(f"{part.name}, row {start + row}: {reason}")
        return _Chunk(inputs, kept, count, problems, part.name, start)

    def _refuse(self, message: str) -> None:
        if self._bad != "skip":
            raise DataError(message, hint="mend it and run again with --restart, or go on with --bad-rows skip")

    def _blank(self, rows: int) -> Arrays:
        layout = self._layout
        shapes = layout.signature.shapes()
        for name in layout.stacked:
            shapes[name] = (rows, *shapes[name][1:])
        return {name: np.zeros(shape, layout.signature.input(name).dtype) for name, shape in shapes.items()}

    def _not_finite(self, inputs: Arrays, rows: int, known: Mapping[int, str]) -> dict[int, str]:
        found: dict[int, str] = {}
        for name, array in inputs.items():
            if array.dtype.kind != "f":
                continue
            finite = np.isfinite(array)
            if finite.all():
                continue
            bad = range(rows) if name in self._layout.shared else np.flatnonzero(~finite.reshape(rows, -1).all(axis=1))
            found |= {int(row): f"input {name!r} holds NaN or Inf" for row in bad if row not in known}
        return found

    def _made(self, shard: int, chunks: list[_Chunk], digest: Any) -> Batch:
        rows = sum(chunk.rows for chunk in chunks)
        inputs = {name: _joined([chunk.arrays[name] for chunk in chunks]) for name in self._layout.stacked}
        starts = itertools.accumulate((chunk.rows for chunk in chunks), initial=0)
        failed = [start + row for start, chunk in zip(starts, chunks, strict=False) for row in sorted(chunk.problems)]
        if digest is not None:
            for array in inputs.values():
                digest.update(array.data if array.size else b"")
        for name, array in inputs.items():
            if failed:
                inputs[name] = array = array.copy()
                array[failed] = 0
            if rows < self._layout.smallest:
                inputs[name] = np.concatenate([array, np.repeat(array[-1:], self._layout.smallest - rows, axis=0)])
        for name in self._layout.shared:
            shared = chunks[0].arrays[name]
            inputs[name] = np.nan_to_num(shared, posinf=0.0, neginf=0.0) if len(failed) == rows else shared
        return Batch(
            shard,
            rows,
            inputs,
            {name: _joined([chunk.kept[name] for chunk in chunks]) for name in self._layout.keep},
            tuple(failed),
            tuple(failure for chunk in chunks for failure in _failures(chunk)),
            last=False,
            digest=digest.hexdigest() if digest is not None else "",
        )


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))


def _failures(chunk: _Chunk) -> Iterator[Failure]:
    """Neighbouring rows of one reason together."""
    for (_, reason), group in itertools.groupby(
        enumerate(sorted(chunk.problems.items())), key=lambda item: (item[1][0] - item[0], item[1][1])
    ):
        rows = [row for _, (row, _) in group]
        yield Failure(chunk.part, chunk.start + rows[0], chunk.start + rows[-1] + 1, reason)
