"""What `enginesmith debug` shows: the tensors in the order of the graph, the node that makes the error, and why."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from ..debug.causes import Operand
from ..debug.debug import Debugged
from ..debug.distance import Distance
from ..debug.findings import Culprit, Findings
from ..debug.trace import Row
from .console import _console, print_table

WHOLE = 30
"""Tables of more rows show what matters, and the rows around it."""

AROUND = 2
COLOURS = {"makes": "red", "inherits": "yellow", "ok": "green", "unknown": "dim"}


def show_debugged(debugged: Debugged) -> None:
    """All of it."""
    found = debugged.findings
    console = _console()
    _show_rows(console, found)
    outputs = ", ".join(
        f"{escape(name)} {'not finite' if error is None else _text(error)}" for name, error in debugged.outputs.items()
    )
    console.print(
        f"{debugged.engine} against {debugged.against}, run by {debugged.runs_on}, sample {debugged.sample} (the worst "
        f"of {debugged.samples}): relative L2 of the outputs {outputs}; {found.threshold:g} is allowed",
        soft_wrap=True,
        highlight=False,
    )
    for note in found.notes:
        console.print(f"[yellow]note[/]: {escape(note)}", soft_wrap=True, highlight=False)
    if not found.diverges:
        console.print("[green]nothing diverges[/] beyond the threshold")
        return
    if found.first is not None:
        console.print(f"first diverging: {_node(found.first)}", soft_wrap=True, highlight=False)
    if found.region is not None:
        before, after = (", ".join(names) for names in (found.region.before, found.region.after))
        console.print(
            f"by bisecting: the error begins between {escape(before or 'the inputs')} and "
            f"{escape(after or 'the outputs')}, at {escape(', '.join(found.region.nodes))}",
            soft_wrap=True,
            highlight=False,
        )
    if found.culprit is not None:
        _show_culprit(console, found.culprit)


def _show_culprit(console: Console, culprit: Culprit) -> None:
    row, why = culprit.row, culprit.explanation
    console.print(f"[red]makes the error[/]: {_node(row)}", soft_wrap=True, highlight=False)
    console.print(
        f"  own error {_size(row.local)} from right inputs; alone it puts the outputs off by {_text(culprit.effect)}",
        highlight=False,
    )
    console.print(f"  its values: {_span(why.low, why.high)}", highlight=False)
    for operand in why.operands:
        console.print(f"  {_operand(operand)}", soft_wrap=True, highlight=False)
    for cause in why.causes:
        console.print(f"  [bold]cause[/]: {escape(cause)}", soft_wrap=True, highlight=False)


def _show_rows(console: Console, found: Findings) -> None:
    headers = ("tensor", "operator", "dtype", ">rel. L2", ">SNR dB", ">max abs", ">own error", "verdict")
    kept = _kept(found)
    rows: list[Sequence[str]] = []
    for index, row in enumerate(found.rows):
        if index in kept:
            rows.append(_cells(found, row))
        elif index - 1 in kept:
            rows.append(("...",) + ("",) * (len(headers) - 1))
    print_table(console, headers, rows, drop=("max abs", "SNR dB"))


def _kept(found: Findings) -> set[int]:
    """Places of the rows to show."""
    if len(found.rows) <= WHOLE:
        return set(range(len(found.rows)))
    marked = {found.first, found.culprit.row if found.culprit else None}
    special = [index for index, row in enumerate(found.rows) if row in marked or row.name in found.effects]
    special += [0, len(found.rows) - 1]
    return {near for index in special for near in range(index - AROUND, index + AROUND + 1)}


def _cells(found: Findings, row: Row) -> tuple[str, ...]:
    total, verdict = row.total, found.verdict(row)
    return (
        escape(row.name),
        row.segment.main.op_type,
        row.dtype,
        _size(total),
        "-" if total is None else "equal" if total.size == 0 else _text(total.snr_db, ".1f"),
        _text(total.max_abs if total else None),
        _size(row.local),
        f"[{COLOURS[verdict]}]{verdict}[/]",
    )


def _node(row: Row) -> str:
    main = row.segment.main
    name = f" {escape(main.name)}" if main.name else ""
    return f"{main.op_type}{name} ({row.dtype}), which gives {escape(row.name)}"


def _operand(operand: Operand) -> str:
    kind = "weight" if operand.weight else "input"
    text = f"{kind} {escape(operand.name)}: {_span(operand.low, operand.high)}"
    if operand.error:
        text += f", read with an error of {_text(operand.error)}"
    return text + (f", {operand.clipped:.2%} clipped" if operand.clipped else "")


def _span(low: float | None, high: float | None) -> str:
    return "nothing finite" if low is None or high is None else f"{low:.3g} to {high:.3g}"


def _size(found: Distance | None) -> str:
    if found is None:
        return "-"
    words = [f"{count} {kind}" for kind, count in (("NaN", found.nan), ("Inf", found.inf)) if count]
    return ", ".join(words) or _text(found.relative_l2)


def _text(value: float | None, form: str = ".2g") -> str:
    return "-" if value is None else format(value, form)
