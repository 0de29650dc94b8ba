"""What a run decides by itself: rows of a call, and rows of a shard. It depends on bundle and data, never on time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ..compiler.engine import engine_info
from ..compiler.manifest import Manifest
from ..errors import UsageError
from ..targets.base import EngineInfo
from .layout import Layout

SHARD_BYTES = 64 << 20
SHARD_S = 10.0
SHARD_BATCHES = 1024
"""A shard has at most this size, this time as the bundle measured it (or, where it did not, this many batches), and one
batch at least."""

SHARES = 64
LEAST_S = 1.0
LEAST_BATCHES = 16
"""All rows make so many shards at least, so that several devices can share them, unless that made a shard shorter than
this time or, where it is not known, than so many batches."""


def stateless_info(bundle: Path, name: str) -> EngineInfo:
    """The description of an engine whose rows are independent of each other.

    Raises:
        EngineMismatchError: it cannot be read.
        UsageError: it carries state from row to row.
    """
    info = engine_info(bundle, name)
    if info.stateful:
        raise UsageError(
            f"engine {name} carries state from one call to the next, so rows are not independent of each other",
            hint="call it from Python: enginesmith.load(bundle), and engine.reset() before each sequence",
        )
    return info


def batch_of(layout: Layout, given: int | None, best: int | None) -> int:
    """Rows of a call: as given, or the best that was found, or what the engine was tuned for.

    Raises:
        UsageError: the engine does not take what is given.
    """
    if given is not None:
        layout.check_batch(given)
        return given
    return best if best is not None and layout.smallest <= best <= layout.largest else layout.usual


def shard_rows_of(
    manifest: Manifest, engine: str, batch: int, row_bytes: Mapping[str, int], total: int | None, given: int | None
) -> int:
    """Rows of a shard: a multiple of the batch, unless it is given.

    Args:
        row_bytes: size of a row of each output that is written.
        total: rows of the data; None where only reading tells.

    Raises:
        UsageError: what is given is no number of rows.
    """
    if given is not None:
        if given < 1:
            raise UsageError("a shard has one row at least", found=given)
        return given
    row_s = min(_row_s(manifest, engine), default=None)
    most, least = SHARD_BATCHES, LEAST_BATCHES
    if row_s:
        most, least = (int(seconds / (row_s * batch)) for seconds in (SHARD_S, LEAST_S))
    limits = [SHARD_BYTES // max(sum(row_bytes.values()), 1) // batch, most]
    if total is not None:
        limits.append(max(-(-total // (SHARES * batch)), least))
    return batch * max(min(limits), 1)


def _row_s(manifest: Manifest, engine: str) -> Iterator[float]:
    """Seconds that a row took in each of the measurements that the bundle has of the engine."""
    benchmark = manifest["benchmark"]
    for timing in benchmark["timings"] if benchmark else []:
        if timing["candidate"] == engine and timing.get("batch"):
            yield timing["p50_ms"] / 1e3 / timing["batch"]
    for curve in manifest.get("batches", ()):
        if curve["engine"] == engine:
            for point in curve["points"]:
                if point["p50_ms"] is not None:
                    yield point["p50_ms"] / 1e3 / point["batch"]
