"""What `enginesmith diagnose` shows: what bounds the time, the layers that take most of it, and what would help."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from ..diagnosis.diagnosed import Diagnosed
from ..diagnosis.eager import Eager, Row
from ..manifest import Action, Roofline, RooflineNode
from .console import _console, print_table

COLOURS = {
    "compute": "green", "bandwidth": "cyan", "launch": "yellow", "cpu-placed": "red", "transfer": "red",
    "unknown": "dim",
}  # fmt: skip
WIDTH = 44
"""Characters of a name; the JSON has them all."""


def show_diagnosed(found: Diagnosed, top: int) -> None:
    """All of it; of layers, operators and modules the `top` that take most."""
    console = _console()
    if found.eager:
        _show_eager(console, found.eager, top)
    for roofline, use in found.engines:
        _show_roofline(console, roofline, top)
        _show_use(console, use.to_json())
        if found.reading:
            share = found.reading.share(use.call_ms)
            verdict = "[red]input-bound[/]" if found.reading.is_bound(use.call_ms) else "not input-bound"
            _print(
                console,
                f"data: {escape(found.reading.description)} takes {_ms(found.reading.read_ms)} ms a batch, {share:.0%} "
                f"of reading and running it: {verdict}",
            )
        _show_actions(console, roofline, top)
    for what, reason in found.missing.items():
        _print(console, f"[yellow]{escape(what)}[/]: {escape(reason)}")


def _show_eager(console: Console, eager: Eager, top: int) -> None:
    _print(console, f"[bold]torch eager[/] on {eager.device}: {_ms(eager.use.call_ms)} ms a call")
    _show_use(console, eager.use.to_json())
    for title, rows in (("operator", eager.operators), ("module", eager.modules)):
        total = sum(row.ms for row in rows) or 1.0
        headers = (title, ">calls", ">ms", ">share", ">GFLOP/s")
        print_table(console, headers, [_eager_cells(row, total) for row in rows[:top]], drop=("GFLOP/s",))
        _show_rest(console, [row.ms for row in rows], top)


def _eager_cells(row: Row, total: float) -> Sequence[str]:
    rate = f"{row.flops / row.ms / 1e6:.3g}" if row.flops and row.ms else "-"
    return _cut(row.name), str(row.count), _ms(row.ms), f"{row.ms / total:.0%}", rate


def _show_roofline(console: Console, roofline: Roofline, top: int) -> None:
    at = ", ".join(f"{axis}={size}" for axis, size in roofline["sizes"].items())
    where = f" at {at}" if at else ""
    _print(
        console,
        f"[bold]{roofline['engine']}[/] on {escape(roofline['device'])}: {_ms(roofline['total_ms'])} ms a call{where}, "
        f"by {roofline['how']}",
    )
    peaks = ", ".join(f"{name} {rate:.0f}" for name, rate in roofline["peaks"].items())
    _print(
        console,
        f"ceilings of this machine: {peaks} GFLOP/s; {roofline['bandwidth_gb_s']:.0f} GB/s of memory; "
        f"{roofline['launch_us']:.2g} us to start a kernel",
        style="dim",
    )
    headers = ("layer", "operator", "nodes", ">ms", ">share", ">GFLOP/s", ">GB/s", ">of ceiling", "bound by")
    rows = [_cells(node) for node in roofline["nodes"][:top]]
    print_table(console, headers, rows, drop=("nodes", "GB/s", "operator"))
    _show_rest(console, [node["ms"] for node in roofline["nodes"]], top)
    total = roofline["total_ms"] or 1.0
    shares = [f"[{COLOURS[name]}]{name} {ms / total:.0%}[/]" for name, ms in roofline["bounds"].items() if ms > 0]
    if roofline["outside_ms"] > 0.005 * total:
        shares.append(f"outside of layers {roofline['outside_ms'] / total:.0%}")
    unmapped = roofline["unmapped_ms"] / total
    tail = f"; {unmapped:.0%} of the time is in layers that no node was found for" if unmapped > 0.005 else ""
    _print(console, f"time by bound: {', '.join(shares)}{tail}")
    for note in roofline["notes"]:
        _print(console, f"[yellow]note[/]: {escape(note)}")


def _cells(node: RooflineNode) -> Sequence[str]:
    seconds = node["ms"] / 1000
    amounts = (node["flops"], node["bytes"])
    rates = [f"{amount / seconds / 1e9:.3g}" if amount and seconds else "-" for amount in amounts]
    limit = node["limit_ms"]
    covers = "" if node["covers"] in ([node["name"]], []) else " ".join(node["covers"])
    return (
        _cut(node["name"]), escape(node["operator"]), _cut(covers) or "-", _ms(node["ms"]), f"{node['share']:.1%}",
        *rates,
        "-" if limit is None or not node["ms"] else f"{min(9.99, limit / node['ms']):.0%}",
        f"[{COLOURS[node['bound']]}]{node['bound']}[/]",
    )  # fmt: skip


def _show_rest(console: Console, times: Sequence[float], top: int) -> None:
    if len(times) > top:
        console.print(f"and {len(times) - top} more, {_ms(sum(times[top:]))} ms together", style="dim")


def _show_use(console: Console, use: dict[str, object]) -> None:
    parts = [f"{float(str(use['cpu'])):.0%} of the processors in use"]
    if use["gpu"] is not None:
        parts.append(f"GPU {float(str(use['gpu'])):.0%} in use")
    if use["gpu_memory_bytes"] is not None:
        parts.append(f"{float(str(use['gpu_memory_bytes'])) / 1e9:.2f} GB of its memory")
    if isinstance(fragments := use["fragmentation"], dict) and fragments:
        parts.append(
            f"torch holds {fragments['reserved_bytes'] / 1e9:.2f} GB for {fragments['allocated_bytes'] / 1e9:.2f} GB "
            f"of tensors, {fragments['share']:.0%} split and idle"
        )
    if float(str(use["foreign_cpu"])) > 0.12:
        parts.append(f"[yellow]other processes took {float(str(use['foreign_cpu'])):.0%}: times are worth less[/]")
    _print(console, "machine: " + ", ".join(parts))


def _show_actions(console: Console, roofline: Roofline, top: int) -> None:
    actions = roofline["actions"]
    if not actions:
        _print(console, "nothing that enginesmith knows would save 1 % of a call")
        return
    console.print("[bold]what would help[/], by the roofline; savings overlap and do not add up")
    headers = ("action", ">saves ms", ">of call", "mostly at", "the ladder found")
    total = roofline["total_ms"] or 1.0
    rows = [
        (
            escape(a["action"]),
            f"about {_ms(a['saves_ms'])}",
            f"{a['saves_ms'] / total:.0%}",
            _cut(a["node"]) or "-",
            _found(a),
        )
        for a in actions[:top]
    ]
    print_table(console, headers, rows, drop=("of call", "the ladder found"))
    for action in actions[:top]:
        _print(console, f"  {escape(action['action'])}: {escape(action['why'])}", style="dim")
    for action in actions[:top]:
        if action["found"]:
            _print(console, f"  the ladder on {escape(action['action'])}: {escape(action['found'])}")
    if roofline["estimates"]:
        _print(console, escape(roofline["estimates"]))


def _found(action: Action) -> str:
    if action["found_ms"] is not None:
        return f"{'saved' if action['found_ms'] >= 0 else 'cost'} {_ms(abs(action['found_ms']))} ms"
    return escape(action["found"].partition(":")[0]) or "-"


def _print(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, soft_wrap=True, highlight=False)


def _cut(name: str) -> str:
    return escape(name if len(name) <= WIDTH else f"{name[: WIDTH - 3]}...")


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
