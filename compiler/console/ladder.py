"""What the command line shows of the ladder."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from ..manifest import Ladder
from ..report.search import Climb, Tried, climbs, what_of
from .console import print_table

COLOURS = {"kept": "green", "not measured": "yellow", "failed": "red"}

LONGEST = 44
"""Characters of what a step changes; the report has all of it."""


def show_ladder(console: Console, ladder: Ladder) -> None:
    """The steps that were built, what came of each, and why the others were left out."""
    found = climbs(ladder)
    rows = [_cells(climb, tried, many=len(found) > 1) for climb in found for tried in _built(climb)]
    headers = ("step", "changes", "outcome", ">gain", ">95 % interval", ">p50 ms", ">rel. L2")
    if rows:
        print_table(console, headers, rows, drop=("changes", "rel. L2", "p50 ms"))
    for climb in found:
        console.print(escape(climb.sentence), soft_wrap=True, highlight=False)
        for reason, names in _left_out(climb).items():
            console.print(f"  {escape(', '.join(names))}: {escape(reason)}", style="dim", soft_wrap=True)
    if not ladder["complete"]:
        console.print("[yellow]The time limit left steps untried: give a higher --time-limit, and it goes on.[/]")


def _built(climb: Climb) -> Sequence[Tried]:
    """All but the first engine and what was left out."""
    return [tried for tried in climb.tried if tried.step["status"] not in ("start", "skipped")]


def _cells(climb: Climb, tried: Tried, *, many: bool) -> tuple[str, ...]:
    step, what = tried.step, what_of(tried.step)
    gain = tried.gain
    colour = COLOURS.get(step["status"])
    return (
        escape(f"{climb.target}: {step['step']}" if many else step["step"]),
        escape(what if len(what) <= LONGEST else f"{what[: LONGEST - 1]}…"),
        f"[{colour}]{tried.verdict}[/]" if colour else tried.verdict,
        f"{gain['ratio']:.2f}" if gain else "-",
        f"{gain['low']:.2f} to {gain['high']:.2f}" if gain else "-",
        "-" if step["p50_ms"] is None else f"{step['p50_ms']:.3g}",
        "-" if step["relative_l2"] is None else f"{step['relative_l2']:.1e}",
    )


def _left_out(climb: Climb) -> dict[str, list[str]]:
    """Steps that failed or were left out, by the first line of the reason."""
    reasons: dict[str, list[str]] = {}
    for tried in climb.tried:
        if tried.step["status"] in ("failed", "skipped") and tried.step is not climb.tried[0].step:
            name = " ".join(filter(None, (tried.step["step"], what_of(tried.step))))
            reasons.setdefault(tried.step["reason"].partition("\n")[0], []).append(name)
    return reasons
