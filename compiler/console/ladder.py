"""What the command line shows of the ladder."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from ..manifest import Ladder
from ..report import waterfall
from .console import print_table


def show_ladder(console: Console, ladder: Ladder) -> None:
    """The steps that were tried, and what came of each."""
    colours = {"kept": "green", "not measured": "yellow", "failed": "red"}
    rows = []
    for step in ladder["steps"]:
        word = waterfall.WORDS[step["status"]]
        colour = colours.get(step["status"])
        gain = step["ratio"]
        interval = f"{gain['ratio']:.2f} [{gain['low']:.2f}, {gain['high']:.2f}]" if gain else "-"
        error = "-" if step["relative_l2"] is None else f"{step['relative_l2']:.1e}"
        name = f"{step['target']}: {step['step']}"
        mark = f"[{colour}]{word}[/]" if colour else word
        rows.append((escape(name), escape(step["what"]), mark, escape(interval), error))
    headers = ("step", "tried", "", ">gain (95 %)", ">rel. L2")
    print_table(console, headers, rows, drop=("tried",))
    for target, steps in waterfall.by_target(ladder).items():
        console.print(escape(waterfall.sentence(target, steps, ladder["picks"].get(target))), soft_wrap=True)
    if not ladder["complete"]:
        console.print("[yellow]The time limit left steps untried: give a higher --time-limit, and it goes on.[/]")
