"""The commands of `enginesmith cache`, and what they show."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from ...errors import RecipeError
from ..storage.archive import PORTABLE, export_entries, import_entries
from ..storage.cache import Cache, room_bytes
from ..storage.entries import KINDS, LOOSE, SEALED, Entry, scan
from ..storage.pruning import Pruned, prune, verify
from .commands import Named, printing
from .console import _console, print_table

Show = Callable[[Any, bool, bool, Callable[[], None]], None]
"""Prints a result as JSON, or calls a function that prints it for people, or neither."""

_SECONDS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def cache_group(show: Show) -> click.Group:
    """All of them."""
    sealed = _kinds(SEALED)
    file = click.Argument(["file"], type=click.Path(path_type=Path))
    size = click.Option(["--max-size", "max_gb"], type=click.FloatRange(min=0), metavar="GB", help="What may be left.")
    age = click.Option(["--older-than"], metavar="AGE", help="Remove what was unused for longer, for instance 30d.")
    everything = click.Option(["--all", "everything"], is_flag=True, help="Remove all that is not being read.")
    keep = click.Option(["--keep"], is_flag=True, help="Report broken entries, and leave them there.")
    commands = [
        click.Command("list", params=[_kinds(KINDS)], help="Show what is in the cache."),
        click.Command(
            "prune",
            params=[size, age, _kinds(KINDS), everything],
            help="Remove what was unused for longest, down to ENGINESMITH_CACHE_GB or what is given.",
        ),
        click.Command("verify", params=[sealed, keep], help="Compare every entry with its hashes."),
        click.Command("export", params=[file, sealed], help="Write entries to a file, for another machine."),
        click.Command("import", params=[file], help="Take the entries of a file."),
    ]
    run: dict[str, Callable[..., int]] = {
        "list": _list,
        "prune": _prune,
        "verify": _verify,
        "export": _export,
        "import": _import,
    }
    for command in commands:
        command.callback = _bound(run[str(command.name)], show)
    return Named("cache", commands={str(command.name): printing(command) for command in commands})


def _bound(run: Callable[..., int], show: Show) -> Callable[..., int]:
    def callback(as_json: bool, quiet: bool, **options: Any) -> int:
        return run(Cache(), lambda result, shown: show(result, as_json, quiet, shown), **options)

    return callback


def _kinds(names: Sequence[str]) -> click.Option:
    return click.Option(["--kind", "kinds"], multiple=True, type=click.Choice(names), help="Only this kind.")


Told = Callable[[Any, Callable[[], None]], None]


def _list(cache: Cache, show: Told, kinds: Sequence[str]) -> int:
    entries = sorted(scan(cache.root, kinds or KINDS), key=lambda entry: (KINDS.index(entry.kind), -entry.used))
    total = sum(entry.size_bytes for entry in entries)
    result = {
        "folder": str(cache.root),
        "size_bytes": total,
        "room_bytes": room_bytes(),
        "entries": [entry.to_json() for entry in entries],
    }

    def table() -> None:
        now, console = time.time(), _console()
        headers = ("kind", "key", ">MB", "age", "unused for", "what")
        rows = [
            (e.kind, escape(e.key[:12]), _mb(e.size_bytes), _age(now - e.created), _age(now - e.used), _what(e))
            for e in entries
        ]
        if rows:
            print_table(console, headers, rows, drop=("age", "unused for"))
        told = f"{len(entries)} entries, {total / 1e9:.3g} of {room_bytes() / 1e9:g} GB in {cache.root}"
        console.print(told, soft_wrap=True, markup=False, highlight=False)

    show(result, table)
    return 0


def _prune(
    cache: Cache, show: Told, max_gb: float | None, older_than: str | None, kinds: Sequence[str], everything: bool
) -> int:
    if everything and (max_gb is not None or older_than is not None):
        raise RecipeError("--all leaves nothing for --max-size and --older-than to choose", hint="give one of them")
    age_s = None if older_than is None else parse_age(older_than)
    # An age alone says all: what is younger stays, however much it is.
    room = (
        0.0 if everything else max_gb * 1e9 if max_gb is not None else room_bytes() if age_s is None else float("inf")
    )
    done = prune(cache.root, room, older_than_s=age_s, kinds=kinds or KINDS)
    result = {
        "removed": [entry.to_json() for entry in done.removed],
        "in_use": [entry.to_json() for entry in done.in_use],
        "left_bytes": done.left_bytes,
    }
    show(result, lambda: _console().print(_pruned(done), markup=False, highlight=False, soft_wrap=True))
    return 0


def _verify(cache: Cache, show: Told, kinds: Sequence[str], keep: bool) -> int:
    found = verify(cache.root, kinds or KINDS, remove=not keep)
    broken = [{**entry.to_json(), "removed": (entry.kind, entry.key) in found.removed} for entry in found.broken]

    def lines() -> None:
        console = _console()
        for entry in broken:
            fate = "removed" if entry["removed"] else "still there"
            told = f"[red]{entry['kind']}/{escape(entry['key'])}[/]: {escape(entry['problem'])}; {fate}"
            console.print(told, soft_wrap=True, highlight=False)
        console.print(f"{found.entries} entries, {len(broken)} broken", highlight=False)

    show({"entries": found.entries, "broken": broken}, lines)
    return 1 if broken else 0


def _export(cache: Cache, show: Told, file: Path, kinds: Sequence[str]) -> int:
    written = export_entries(cache, file, kinds or PORTABLE)
    size = file.stat().st_size
    told = f"{len(written)} entries, {_mb(size)} MB, are in {file}"
    result = {"file": str(file), "size_bytes": size, "entries": [entry.to_json() for entry in written]}
    show(result, lambda: _console().print(told, soft_wrap=True, markup=False, highlight=False))
    return 0


def _import(cache: Cache, show: Told, file: Path) -> int:
    done = import_entries(cache, file)
    told = f"{len(done.added)} entries were added, {len(done.known)} were there"
    result = {"added": [e.to_json() for e in done.added], "known": [e.to_json() for e in done.known]}
    show(result, lambda: _console().print(told, highlight=False))
    return 0


def parse_age(text: str) -> float:
    """Seconds of an age such as ``30d``.

    Raises:
        RecipeError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text.strip().lower())
    if match is None:
        raise RecipeError(
            f"--older-than {text!r} is no age", expected="a number of minutes, hours, days or weeks: 90m, 12h, 30d, 4w"
        )
    return float(match[1]) * _SECONDS[match[2]]


def _pruned(done: Pruned) -> str:
    freed = sum(entry.size_bytes for entry in done.removed)
    stay = f", {len(done.in_use)} that are in use or cannot be removed stay" if done.in_use else ""
    return f"{len(done.removed)} entries, {_mb(freed)} MB, were removed{stay}; {_mb(done.left_bytes)} MB are left"


def _what(entry: Entry) -> str:
    if entry.problem:
        return f"[red]{escape(entry.problem)}[/]"
    return escape(", ".join(entry.what.values())) if entry.kind not in LOOSE else "[dim]kept by its builder[/]"


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.1f}" if size_bytes >= 1e5 else f"{size_bytes / 1e6:.3f}"


def _age(seconds: float) -> str:
    for unit, factor in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= factor:
            return f"{seconds / factor:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
