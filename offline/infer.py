"""Runs batches through an engine and gives shards: reading is ahead of it, and writing behind."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import EngineError, EnginesmithError
from .ahead import ahead, grouped
from .batches import Batch, Failure
from .parts import Arrays
from .shards import Shard, write_shard

AHEAD = 2
"""Groups of batches that are read while the engine runs."""


class Runs(Protocol):
    """As much of an `Engine` as is needed here."""

    def run(self, inputs: Any) -> dict[str, Any]:
        """Outputs by name."""


def infer(
    engine: Runs, batches: Iterable[Batch], outputs: Sequence[str], tick: Callable[[int], None] = lambda rows: None
) -> Iterator[Shard]:
    """The shards of these batches.

    Args:
        tick: told of rows that are done.

    Raises:
        EngineError: the engine failed, or gives something else than a result a row.
    """
    parts: list[Arrays] = []
    failures: list[Failure] = []
    rows = 0
    for batch in batches:
        try:
            found = engine.run(batch.inputs)
        except EnginesmithError as error:
            error.message = f"shard {batch.shard}, rows {rows} to {rows + batch.rows}: {error.message}"
            raise
        parts.append({name: _result(found[name], name, batch) for name in outputs} | batch.kept)
        failures += batch.failures
        rows += batch.rows
        tick(batch.rows)
        if batch.last:
            yield Shard(batch.shard, rows, _stacked(parts), tuple(failures), batch.digest)
            parts, failures, rows = [], [], 0


def run_batches(
    engine: Runs,
    batches: Iterator[Batch],
    outputs: Sequence[str],
    folder: Path,
    done: Callable[[dict[str, Any]], None],
    tick: Callable[[int], None] = lambda rows: None,
) -> None:
    """Reads, runs and writes the shards of these batches, all at once; `done` is told of each in order.

    Raises:
        EnginesmithError: reading, running or writing failed.
    """

    def write(shard: Shard) -> None:
        done(write_shard(folder, shard))

    written: Future[None] | None = None
    with ThreadPoolExecutor(1, "enginesmith-write") as writer, ahead(grouped(batches), AHEAD) as read:
        for shard in infer(engine, itertools.chain.from_iterable(read), outputs, tick):
            if written is not None:
                written.result()
            written = writer.submit(write, shard)
        if written is not None:
            written.result()


def _result(output: Any, name: str, batch: Batch) -> np.ndarray:
    array = np.asarray(output)
    given = len(next(iter(batch.inputs.values())))
    if array.shape[:1] != (given,):
        raise EngineError(
            f"output {name!r} is not one result a row", expected=f"({given}, ...)", found=array.shape,
            hint="name other outputs with --only",
        )  # fmt: skip
    if not batch.failed:
        return array if batch.rows == given else array[: batch.rows].copy()
    array = array[: batch.rows].copy()
    array[list(batch.failed)] = np.nan if array.dtype.kind == "f" else 0
    return array


def _stacked(parts: Sequence[Arrays]) -> Arrays:
    try:
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    except ValueError as error:
        raise EngineError(
            "the outputs of rows differ in shape, though the rows do not",
            found=error,
            hint="use --batch 1 --shard-rows 1",
        ) from error
