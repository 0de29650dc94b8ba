"""`enginesmith run`: batch inference over files, in order, that goes on where it was stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..compiler.engine import read_manifest
from ..compiler.progress import Progress
from ..compiler.storage.files import sha256
from ..compiler.storage.locks import taking
from ..errors import DataError, OutputError
from .choices import batch_of, shard_rows_of, stateless_info
from .executors import executor
from .job import Choice, Job
from .layout import choose_outputs, layout_of
from .meter import Meter
from .plan import BadRows, survey
from .record import Record, remove
from .results import Outputs
from .shards import remove_partial, writing
from .source import Source, open_source


def run(
    bundle: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    engine: str | None = None,
    batch: int | None = None,
    shard_rows: int | None = None,
    only: Sequence[str] = (),
    keep: Sequence[str] = (),
    bad_rows: BadRows = "stop",
    gpus: Sequence[int] = (),
    processes: int | None = None,
    ray: str | None = None,
    restart: bool = False,
    targets: Sequence[str] = (),
    progress: Progress | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Outputs:
    """Runs all rows of the data through an engine, and writes the outputs in their order; see docs/batch-inference.md.

    A run that was stopped goes on where it was when it is called again; one that is done says so at once.

    Args:
        bundle: the folder that `compile` wrote.
        data: a file (.npy, .npz, .jsonl), a folder or pattern of such, Polygraphy's .json, or ``file.py:function``.
        out: folder of the outputs.
        engine: name of an engine; None for the fastest that can run here.
        batch: rows of a call; None for the best that the batch search found, or else what the engine was tuned for.
        shard_rows: rows of a file of outputs; None for about ten seconds of work, and 64 MiB at most.
        only: outputs to write; all by default.
        keep: arrays of the data to write beside them.
        bad_rows: what becomes of rows that do not fit or hold NaN or Inf: "stop", "skip", or "run" them all the same.
        gpus: a process with an engine for each of these.
        processes: how many, each with an engine and its share of the processors; or actors of Ray.
        ray: address of a Ray cluster, "local" to start one; None for no Ray.
        restart: begins anew where an earlier run left something.
        targets: targets of your own that engines were built for, as ``file.py:Class``; their code runs.
        progress: told how far it is.
        log: told of processes that died and were started again.

    Raises:
        UsageError: options that contradict each other, or an earlier run of something else.
        DataError: data that does not fit.
        OutputError: the folder cannot be written, or holds something else.
        EngineError: the engine cannot be loaded, or failed.
        StorageError: the disk is full.
    """
    root, folder = Path(bundle), Path(out)
    manifest = read_manifest(root)
    with _locked(folder):
        if restart:
            remove(folder)
        record = Record.read(folder)
        asked: dict[str, Any] = {"bundle": {"sha256": sha256(root / "manifest.json")}}
        if record is not None:
            record.check(asked if engine is None else {**asked, "engine": engine})
            engine = record.settings["engine"]
        choice = Choice(str(root), engine, "cuda" if gpus else None, tuple(targets))
        with contextlib.closing(executor(choice, gpus=gpus, processes=processes, ray=ray, log=log)) as runs:
            opened = None if record else runs.describe()
            info = stateless_info(root, opened["engine"] if opened else str(engine))
            layout = layout_of(info.signature, keep=keep)
            outputs = choose_outputs(info.signature, only, keep)
            source = open_source(str(data), layout)
            asked |= {"engine": info.name, "data": dict(source.identity), "outputs": list(outputs), "keep": list(keep)}
            if record is not None:
                sizes = {"batch": batch, "shard_rows": shard_rows}
                record.check({**asked, **{name: size for name, size in sizes.items() if size is not None}})
                if record.complete:
                    return Outputs.of(record)
            total = survey(source, layout, bad_rows)
            if opened is not None:
                size = batch_of(layout, batch, opened["best_batch"])
                row_bytes = {name: opened["row_bytes"][name] for name in outputs}
                rows = shard_rows_of(manifest, info.name, size, row_bytes, total, shard_rows)
                paths = {"bundle_path": str(root), "data_path": str(data)}
                record = Record(folder, {**asked, "batch": size, "shard_rows": rows, **paths})
            else:
                runs.describe()
            assert record is not None
            record.begin()
            job = Job(
                str(data), str(folder), record.settings["batch"], record.settings["shard_rows"],
                outputs, tuple(keep), bad_rows, hashed=not source.files,
            )  # fmt: skip
            meter = Meter(progress or Progress(), total, record.total("rows"))
            runs.run(job, source, layout, record.shards, record.add, meter.tick)
            _check_rows(record, source, total)
            record.finish()
            return Outputs.of(record, new_rows=meter.rows, seconds=meter.seconds)


def _check_rows(record: Record, source: Source, total: int | None) -> None:
    """Nothing is done before every row is."""
    rows = record.total("rows")
    if not rows:
        raise DataError(f"{source.description} holds no rows", expected="at least one", found="none")
    if total is not None and rows != total:
        raise DataError(
            f"{source.description} changed while it was read", expected=f"{total} rows", found=rows,
            hint="run again with --restart",
        )  # fmt: skip


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder, for one process at a time, without what killed ones left half-written; gone again if it stays empty.

    Raises:
        OutputError: another process has it, or it cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output {str(folder)!r} is a file", expected="a folder, or a path where none is yet")
    with writing(folder, "the folder"):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with taking(folder / "run.lock") as lock:
            if lock == "busy":
                raise OutputError(
                    f"another process writes to {str(folder)!r}", hint="wait for it, or choose another folder"
                )
            remove_partial(folder)
            try:
                yield
            finally:
                remove_partial(folder)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()
