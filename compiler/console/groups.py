"""What `inspect --groups` shows."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from typing import Any

from rich.markup import escape

from .console import _console

_SHOWN = 6
"""Places that are listed for each role; the JSON has all."""


def show_groups(groups: Iterable[Mapping[str, Any]]) -> None:
    """Each group with its tensors, then how many may change, and what stands against the others."""
    console, reasons, count = _console(), collections.Counter[str](), 0
    for group in groups:
        count += 1
        size = "dynamic" if group["size"] is None else group["size"]
        outer = f", in each of {' and '.join(map(str, group['repeated_in']))}" if group["repeated_in"] else ""
        console.print(f"[bold]{escape(group['name'])}[/]  {size}{outer}", soft_wrap=True)
        for role in ("made_by", "read_by", "followed_by"):
            for line in _shortened([_place(place) for place in group[role]]):
                console.print(f"  {role.replace('_', ' '):<12}{escape(line)}", soft_wrap=True)
        if group["carried_by"]:
            first, *others = group["carried_by"]
            more = f" and {len(others)} more" if others else ""
            console.print(f"  carried by  {escape(first + more)}", soft_wrap=True)
        for change in ("shrink", "grow"):
            reason = group[f"why_not_{change}"]
            text = f"[yellow]no[/]: {escape(reason)}" if reason else "[green]yes[/]"
            console.print(f"  {f'may {change}':<12}{text}", soft_wrap=True)
            reasons[f"may {change}: {_told(reason)}"] += 1
    console.print(f"[bold]{count} groups[/]")
    for told, number in sorted(reasons.items()):
        console.print(f"  {number:>4}  {escape(told)}", soft_wrap=True)


def _told(reason: str) -> str:
    """A reason without the node that it is about."""
    return f"no: {reason.rpartition(' (')[0] or reason}" if reason else "yes"


def _shortened(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _SHOWN else [*lines[: _SHOWN - 1], f"and {len(lines) - _SHOWN + 1} more"]


def _place(place: Mapping[str, Any]) -> str:
    layout = "" if place["positions"] == "all" else f" [{place['positions']}]"
    return f"{place['tensor']}:{place['axis']}{layout}" + (f"  ({place['node']})" if place["node"] else "")
