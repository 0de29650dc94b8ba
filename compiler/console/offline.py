"""The options of `run`, its progress, and what it shows at the end."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from ..progress import Progress
from .console import _console, progress

if TYPE_CHECKING:
    from ...offline.results import Outputs

LOG_S = 30.0
"""Time between two lines of a log."""

SHOWN = 20
"""Failures that are listed; the JSON and the manifest have all."""


def run_options() -> list[click.Parameter]:
    """All options of `run`."""
    names = {"multiple": True, "metavar": "NAME"}
    return [
        click.Option(
            ["--data"],
            required=True,
            help="File (.npy, .npz, .jsonl), folder or 'pattern*' of these, or file.py:function.",
        ),
        click.Option(["--out", "-o", "--output"], required=True, help="Folder of the outputs."),
        click.Option(["--engine", "-e"], help="Engine to run. Default: the fastest that runs here."),
        click.Option(
            ["--batch"], type=click.IntRange(1), help="Rows of a call. Default: the best that the batch search found."
        ),
        click.Option(
            ["--shard-rows"], type=click.IntRange(1), help="Rows of a file of outputs. Default: about 10 s of work."
        ),
        click.Option(["--only"], **names, help="Output to write. Default: all."),  # type: ignore[arg-type]
        click.Option(["--keep"], **names, help="Array of the data to write beside the outputs."),  # type: ignore[arg-type]
        click.Option(
            ["--bad-rows"],
            type=click.Choice(["stop", "skip", "run"]),
            default="stop",
            show_default=True,
            help="What becomes of rows with a wrong shape, NaN or Inf; run takes those with NaN or Inf as they are.",
        ),
        click.Option(["--gpus"], metavar="N,N", help="GPUs, each with a process and an engine of its own."),
        click.Option(["--processes"], type=click.IntRange(1), help="Processes on the CPU, or actors of Ray."),
        click.Option(
            ["--ray"],
            is_flag=False,
            flag_value="local",
            metavar="[ADDRESS]",
            help="Run through Ray Data: on the cluster at this address, or on a Ray that is started for it.",
        ),
        click.Option(["--restart"], is_flag=True, help="Begin anew, and remove what an earlier run left."),
        click.Option(["--target", "-t", "targets"], multiple=True, metavar="FILE.py:CLASS", help="Target of your own."),
    ]


@contextlib.contextmanager
def running(quiet: bool) -> Iterator[Progress]:
    """A bar on a terminal, a line now and then elsewhere, nothing where quiet; all on standard error."""
    if quiet or sys.stderr.isatty():
        with progress(quiet) as bars:
            bars.stage("run", 1, 1)
            yield bars
    else:
        yield _Log()


class _Log(Progress):
    """For logs."""

    def __init__(self) -> None:
        self._next = time.monotonic() + LOG_S

    def update(self, fraction: float, what: str) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LOG_S
            print(what, file=sys.stderr, flush=True)


def show_outputs(outputs: Outputs) -> None:
    """What came of a run."""
    from ...offline.meter import duration, rate_text

    console = _console()
    if not outputs.new_rows:
        told = f"all {outputs.rows:,} rows were there already; --restart runs them again"
    else:
        rate = rate_text(outputs.new_rows / outputs.seconds) if outputs.seconds else "-"
        there = outputs.rows - outputs.new_rows
        told = f"{outputs.new_rows:,} rows in {duration(outputs.seconds)}, {rate} rows/s"
        told += f"; {there:,} were there already" if there else ""
    _show_failures(outputs.failed)
    if outputs.failed:
        console.print(f"[red]{outputs.failed_rows:,} rows failed[/]: their outputs are NaN, or 0", soft_wrap=True)
    if outputs.nan_rows:
        console.print(f"[yellow]{outputs.nan_rows:,} rows gave NaN[/]", soft_wrap=True)
    console.print(
        escape(f"{told}: {outputs.path} ({len(outputs.shards)} files, {outputs.engine}, batch {outputs.batch})"),
        soft_wrap=True,
        highlight=False,
    )


def _show_failures(failed: Sequence[dict[str, Any]]) -> None:
    console = _console()
    for failure in failed[:SHOWN]:
        first, end = failure["rows"]
        rows = f"row {first}" if end == first + 1 else f"rows {first} to {end - 1}"
        console.print(escape(f"{failure['file']}, {rows}: {failure['reason']}"), soft_wrap=True, highlight=False)
    if len(failed) > SHOWN:
        console.print(f"and {len(failed) - SHOWN} more, in manifest.json", soft_wrap=True)
