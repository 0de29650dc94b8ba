"""What a process needs to run shards, and the object that runs them: in a worker process, or in an actor of Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..compiler.engine import Device, Engine, load
from ..compiler.machine.requirements import devices
from ..errors import EnginesmithError
from ..targets import get_target
from .batches import Reader
from .infer import run_batches
from .layout import Layout, layout_of, zeros
from .plan import BadRows, Piece, pieces
from .source import open_source


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which engine is to be loaded; plain JSON, so that it can be sent.

    Attributes:
        engine: its name; None for the fastest that can run.
        device: only engines that run there.
        targets: of the user's own, as ``file.py:Class``.
        verify: whether to compare its files with their hashes.
        options: of its target, see `load`.
    """

    bundle: str
    engine: str | None = None
    device: Device | None = None
    targets: Sequence[str] = ()
    verify: bool = True
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def load(self) -> Engine:
        """Loads it."""
        return load(
            self.bundle,
            self.engine,
            device=self.device,
            verify=self.verify,
            targets=self.targets,
            options=self.options,
        )


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be run; plain JSON, so that it can be sent.

    Attributes:
        hashed: whether shards are recorded with the hash of their inputs.
    """

    data: str
    out: str
    batch: int
    shard_rows: int
    outputs: Sequence[str]
    keep: Sequence[str]
    bad_rows: BadRows
    hashed: bool

    def reader(self, layout: Layout) -> Reader:
        """Reads for it."""
        return Reader(layout, self.batch, self.bad_rows, hashed=self.hashed)


def describe(engine: Engine) -> dict[str, Any]:
    """What decides how an engine is used; it is run once, on zeros."""
    layout = layout_of(engine.signature)
    outputs = {} if engine.info.stateful else engine.run(zeros(layout))
    return {
        "engine": engine.name,
        "best_batch": engine.best_batch,
        "devices": list(devices(engine.info, get_target(engine.info.target, engine.info.options))),
        "row_bytes": {name: array.nbytes // layout.smallest for name, array in outputs.items()},
    }


class Shards:
    """Runs single shards with an engine. Files are read in place, functions from the beginning on."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._stream: Iterator[Piece] | None = None
        self._next: Piece | None = None
        self._passed = -1

    def run(self, job: Job, shard: int, spans: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
        """The record of a shard, or the error that it ended with; {"end": true} where the data is at its end.

        Args:
            spans: its pieces; None for a function's, which are counted here.
        """
        found: list[dict[str, Any]] = []
        try:
            layout = layout_of(self._engine.signature, keep=job.keep)
            if spans is None:
                every = self._counted(job, layout, shard)
            else:
                every = (Piece.from_json(shard, dict(span)) for span in spans)
            batches = job.reader(layout).batches(every)
            run_batches(self._engine, batches, job.outputs, Path(job.out), found.append)
        except EnginesmithError as error:
            return {"error": to_json(error)}
        return {"record": found[0]} if found else {"end": True}

    def close(self) -> None:
        """Lets go of the engine."""
        self._engine.close()

    def _counted(self, job: Job, layout: Layout, shard: int) -> Iterator[Piece]:
        """The pieces of one shard of a function; an earlier one begins again."""
        if self._stream is None or shard <= self._passed:
            self._stream = pieces(open_source(job.data, layout).parts(), layout, job.shard_rows)
            self._next = None
        self._passed = shard
        while (piece := self._next or next(self._stream, None)) is not None:
            self._next = None
            if piece.shard > shard:
                self._next = piece
                return
            if piece.shard == shard:
                yield piece


def to_json(error: EnginesmithError) -> dict[str, Any]:
    """An error for another process."""
    details = {name: getattr(error, name) for name in ("expected", "found", "hint")}
    texts = {name: None if value is None else str(value) for name, value in details.items()}
    return {"kind": type(error).__name__, "message": error.message, **texts}


def from_json(value: Mapping[str, Any]) -> EnginesmithError:
    """The inverse of `to_json`: an error of the same exit code and text."""
    from .. import errors

    kind = getattr(errors, value["kind"], errors.EngineError)
    error: EnginesmithError = kind.__new__(kind)
    EnginesmithError.__init__(
        error, value["message"], expected=value["expected"], found=value["found"], hint=value["hint"]
    )
    return error
