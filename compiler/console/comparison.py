"""What `enginesmith compare` takes and shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from ..comparison.records import Check, Comparison, SideRecord
from ..comparison.rules import KINDS, Rules
from ..report import view
from .console import _console, _ms, print_table

COLOURS = {"passed": "green", "failed": "red", "information": "yellow", "skipped": "dim"}


def rule_options() -> list[click.Parameter]:
    """The options that become `Rules`."""
    default = Rules()
    return [
        click.Option(
            ["--tolerance-speed"],
            type=float,
            default=default.tolerance_speed,
            show_default=True,
            metavar="RATIO",
            help="Ratio of times within which A and B are equally fast. B regressed where at one size its whole 95 % "
            "interval lies beyond.",
        ),
        click.Option(
            ["--tolerance-accuracy"],
            type=float,
            metavar="L2",
            help="Relative L2 that B may be farther from its reference than A. Default: B's own bounds alone.",
        ),
        click.Option(
            ["--tolerance-metric"],
            type=float,
            default=default.tolerance_metric,
            show_default=True,
            metavar="DROP",
            help="What the task metric may lose. B regressed where the whole 95 % interval of the change lies beyond.",
        ),
        click.Option(
            ["--max-growth"],
            type=float,
            metavar="SHARE",
            help="Share that the engine's files and GPU memory may grow by. Default: growth is information.",
        ),
        click.Option(
            ["--fail-on"],
            multiple=True,
            metavar="KIND",
            help=f"Kind of regression that fails: {', '.join(KINDS)}, or none. [default: {', '.join(default.fail_on)}]",
        ),
    ]


def rules_of(values: Mapping[str, Any]) -> Rules:
    """The rules out of what the command line gave.

    Raises:
        RecipeError: a limit that cannot be.
        UnknownNameError: a kind of regression that does not exist.
    """
    limits = {
        name: values[name] for name in ("tolerance_speed", "tolerance_accuracy", "tolerance_metric", "max_growth")
    }
    kinds = tuple(part.strip() for text in values["fail_on"] for part in text.split(","))
    return Rules(**limits) if not kinds else Rules(**limits, fail_on=() if kinds == ("none",) else kinds)


def show_comparison(comparison: Comparison) -> None:
    """Both engines, the speed at each size, every other check, and the verdict."""
    console = _console()
    _show_sides(console, comparison["a"], comparison["b"])
    speed = [check for check in comparison["checks"] if check["kind"] == "speed"]
    if speed:
        headers = ("sizes", ">A p50 ms", ">B p50 ms", ">A p99 ms", ">B p99 ms", ">B is times as fast (95 %)", "B is")
        print_table(console, headers, [_speed_cells(check) for check in speed], drop=("A p99 ms", "B p99 ms"))
        console.print(view.RATIO, style="dim", soft_wrap=True)
    others = [check for check in comparison["checks"] if check["kind"] != "speed"]
    print_table(
        console,
        ("check", "of", "verdict"),
        [(check["kind"], escape(check["name"]), _word(check)) for check in others],
        drop=(),
    )
    for check in comparison["checks"]:
        if check["kind"] != "speed" or not check["numbers"].get("ratio"):
            console.print(
                f"{check['kind']}, {escape(check['name'])}: {escape(check['text'])}", soft_wrap=True, highlight=False
            )
    results = comparison["results"]
    console.print(f"compared on {results['samples']} samples: {escape(results['inputs'])}", soft_wrap=True)
    for note in comparison["notes"]:
        console.print(f"[yellow]note[/]: {escape(note)}", soft_wrap=True, highlight=False)
    _show_verdict(console, comparison)


def _show_sides(console: Console, a: SideRecord, b: SideRecord) -> None:
    headers = ("", "engine", "target", "precision", ">MB", "compiled", "from")
    rows = [
        (label, side["engine"], side["target"], side["precision"], f"{side['size_bytes'] / 1e6:.2f}",
         side["created"][:19], escape(side["path"]))
        for label, side in (("A", a), ("B", b))
    ]  # fmt: skip
    print_table(console, headers, rows, drop=("compiled", "target", "precision", "MB"))


def _show_verdict(console: Console, comparison: Comparison) -> None:
    verdict = comparison["verdict"]
    for reason in verdict["reasons"]:
        console.print(f"[red]regressed[/]: {escape(reason)}", soft_wrap=True, highlight=False)
    colour, word = ("green", "PASS") if verdict["passed"] else ("red", "FAIL")
    console.print(f"verdict: [{colour}]{word}[/]   {escape(verdict['text'])}", soft_wrap=True, highlight=False)


def _speed_cells(check: Check) -> tuple[str, ...]:
    numbers = check["numbers"]
    times = (_ms(numbers.get(key)) for key in ("a_p50_ms", "b_p50_ms", "a_p99_ms", "b_p99_ms"))
    ratio = "-"
    if (value := numbers.get("ratio")) is not None:
        ratio = f"{value:.2f} [{numbers['low']:.2f}, {numbers['high']:.2f}]".replace("[", r"\[")
    return check["name"], *times, ratio, _word(check)


def _word(check: Check) -> str:
    return f"[{COLOURS[check['state']]}]{check['verdict']}[/]"
