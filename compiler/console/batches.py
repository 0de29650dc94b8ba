"""What the batch search shows: a curve for each engine, and what was decided on it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from ..batch.choice import CALLS, unmet
from ..manifest import BatchCurve, BatchPoint
from .console import _console, _ms, _percent, print_table


def show_curves(curves: Sequence[BatchCurve]) -> None:
    """All of them, in full."""
    console = _console()
    for curve in curves:
        others = "".join(f", {axis}={size}" for axis, size in curve["sizes"].items())
        console.print(f"[bold]{escape(curve['engine'])}[/], {escape(curve['axis'])}{others} on {curve['device']}")
        headers = (">batch", "fits", ">p50 ms", ">p99 ms", ">calls", ">samples/s", ">GPU %", ">memory MB", "")
        rows = [_cells(curve, point) for point in curve["points"]]
        print_table(console, headers, rows, drop=("GPU %", "calls", "p50 ms"))
        show_decisions(console, [curve])
        for point in curve["points"]:
            if point["reason"]:
                console.print(f"batch {point['batch']}: {escape(point['reason'])}", soft_wrap=True, highlight=False)
    for protocol in dict.fromkeys(curve["protocol"] for curve in curves):
        console.print(escape(protocol), style="dim")


def show_decisions(console: Console, curves: Sequence[BatchCurve]) -> None:
    """What was decided, a line each."""
    for curve in curves:
        by_batch = {point["batch"]: point for point in curve["points"]}
        for line in (_largest(curve), _saturation(curve, by_batch), _best(curve, by_batch)):
            if line:
                console.print(f"{escape(curve['engine'])}: {line}", soft_wrap=True, highlight=False)


def _largest(curve: BatchCurve) -> str:
    if not curve["largest"]:
        return "[red]no batch size that was searched runs[/]"
    if curve["largest_is_limit"]:
        return f"largest batch {curve['largest']}, and no larger one was asked for"
    return f"largest batch {curve['largest']}"


def _saturation(curve: BatchCurve, by_batch: dict[int, BatchPoint]) -> str:
    batch = curve["saturation"]
    if batch is None:
        return ""
    return f"throughput saturates at batch {batch}, with {by_batch[batch]['samples_per_s']:.4g} samples/s"


def _best(curve: BatchCurve, by_batch: dict[int, BatchPoint]) -> str:
    batch, limit_ms = curve["best"], curve["p99_limit_ms"]
    if batch is None:
        return f"[red]{escape(unmet(curve))}[/]" if limit_ms is not None and curve["largest"] else ""
    point = by_batch[batch]
    within = "" if limit_ms is None else f" within a p99 of {limit_ms:g} ms"
    few = f" (p99 over {point['calls']} calls only, of {CALLS} that it needs)" if point["calls"] < CALLS else ""
    return (
        f"most throughput{within} at batch {batch}: {point['samples_per_s']:.4g} samples/s, "
        f"p99 {_ms(point['p99_ms'])} ms{few}"
    )


def _cells(curve: BatchCurve, point: BatchPoint) -> tuple[str, ...]:
    rate, memory = point["samples_per_s"], point["memory_bytes"]
    names = ("largest", "saturation", "best")
    marks = [name for name in names if point["batch"] == curve[name]]  # type: ignore[literal-required]
    calls = "-" if not point["calls"] else f"{point['calls']}"
    return (
        str(point["batch"]),
        "yes" if point["fits"] else "[red]no[/]",
        _ms(point["p50_ms"]),
        _ms(point["p99_ms"]),
        f"[yellow]{calls}[/]" if 0 < point["calls"] < CALLS else calls,
        "-" if rate is None else f"{rate:.1f}",
        _percent(point["gpu_utilization_percent"]),
        "-" if memory is None else f"{memory / 1e6:.0f}",
        ", ".join(marks),
    )
