"""What the command line shows: progress while it works, and tables of the results."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from ..manifest import Benchmark, EngineRecord, OutputMetrics, TaskMetric, Timing, Validation
from ..progress import Progress
from ..report import view
from ..signature import Signature

if TYPE_CHECKING:
    from ..bundle import Bundle

MARKS = {True: "[green]pass[/]", False: "[red]FAIL[/]"}
COLOURS: Mapping[view.State, str] = {"passed": "green", "unproven": "yellow", "failed": "red"}


@contextmanager
def progress(quiet: bool) -> Iterator[Progress]:
    """A bar on a terminal, a line for each stage elsewhere, nothing where quiet; all on standard error."""
    if quiet:
        yield Progress()
    elif not sys.stderr.isatty():
        yield _Lines()
    else:
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
        with Bar(*columns, TextColumn("{task.fields[what]}"), console=Console(stderr=True), transient=True) as bar:
            yield _Bars(bar)


class _Lines(Progress):
    """For logs of pipelines."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def stage(self, name: str, number: int, total: int) -> None:
        print(f"[{number}/{total}] {time.perf_counter() - self._start:6.1f} s  {name}", file=sys.stderr, flush=True)


class _Bars(Progress):
    """For people at a terminal."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task = bar.add_task("start", total=1.0, what="")
        self._number, self._total = 0, 1

    def stage(self, name: str, number: int, total: int) -> None:
        self._number, self._total = number - 1, total
        self._bar.update(self._task, description=f"{number}/{total} {name}", what="")
        self.update(0.0, "")

    def update(self, fraction: float, what: str) -> None:
        done = (self._number + min(max(fraction, 0.0), 1.0)) / self._total
        self._bar.update(self._task, completed=done, what=escape(what))


def show_bundle(bundle: Bundle) -> None:
    """The outcome of a compile."""
    from .batches import show_decisions

    manifest = bundle.manifest
    sizes = Signature.from_json(manifest["signature"]).sizes()
    timings = _at(manifest["benchmark"], sizes)
    headers = (
        "engine", "verdict", ">rel. L2", ">mean ms", ">p50 ms", ">p99 ms", ">requests/s",
        ">speed-up (95 %)", ">MB",
    )  # fmt: skip
    rows = []
    for name in dict.fromkeys([*timings, *(engine["name"] for engine in manifest["engines"])]):
        engine = next((engine for engine in manifest["engines"] if engine["name"] == name), None)
        rows.append((*_engine_cells(name, engine), *_timing_cells(timings.get(name)), _size(engine)))
    console = _console()
    at = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    caption = f"times at {at}" if at and timings else None
    print_table(console, headers, rows, drop=("MB", "mean ms", "requests/s"), caption=caption)
    if timings:
        console.print(view.RATIO, style="dim", soft_wrap=True)
    if ladder := manifest.get("ladder"):
        from .ladder import show_ladder

        show_ladder(console, ladder)
    show_decisions(console, manifest.get("batches", ()))
    for engine in manifest["engines"]:
        _show_reason(console, engine["name"], engine["reason"], engine["to_do"])
        if not engine["dropped"]:
            _show_failures(console, engine["validation"])
    for calibration in manifest["calibration"]:
        for finding in calibration["findings"]:
            if finding["severe"]:
                console.print(
                    f"calibration: [red]{escape(finding['tensor'])}[/] {escape(finding['text'])}", soft_wrap=True
                )
    for note in manifest["verdict"].get("notes", ()):
        console.print(f"[yellow]{escape(note)}[/]", soft_wrap=True)
    if manifest["data"]["random"]:
        console.print("[red]Inputs were random: give --data for a verdict on real inputs.[/]")
    if bundle.cached:
        console.print(f"Unchanged since {manifest['created']}: taken from the cache.")
    state = view.state_of(manifest)
    if state == "unproven":
        console.print(f"Engines were built, but {view.UNPROVEN}.", soft_wrap=True)
    word = f"[{COLOURS[state]}]{view.WORDS[state]}[/]"
    console.print(f"verdict: {word}   report: {bundle.report}", soft_wrap=True, highlight=False)


def show_validations(validations: Sequence[Validation]) -> None:
    """Every output of every engine."""
    headers = ("engine", "output", "verdict", ">rel. L2", ">max abs", ">cosine", ">SNR dB", ">top-1", ">noise floor L2")
    rows = [
        (validation["engine"], escape(output["output"]), *_metric_cells(output, validation["noise_floor"]))
        for validation in validations
        for output in validation["outputs"]
    ]
    console = _console()
    print_table(console, headers, rows, drop=("SNR dB", "top-1", "max abs", "noise floor L2"))
    for validation in validations:
        _show_failures(console, validation)
        if metric := validation["metric"]:
            console.print(
                f"{validation['engine']}: {escape(metric['name'])} {metric['value']:.4f} "
                f"[{metric['low']:.4f}, {metric['high']:.4f}], reference {metric['reference']:.4f}, "
                f"{metric['samples']} samples{_perplexities(metric)}",
                markup=False,
            )


def _perplexities(metric: TaskMetric) -> str:
    if "perplexity" not in metric:
        return ""
    return f"; perplexity {metric['perplexity']:.3f}, reference {metric['perplexity_of_reference']:.3f}"


def show_benchmark(benchmark: Benchmark) -> None:
    """Every candidate at every size."""
    headers = (
        "candidate", "sizes", ">mean ms", ">p50 ms", ">p99 ms", ">device ms", ">requests/s", ">samples/s",
        ">GPU %", ">speed-up (95 %)",
    )  # fmt: skip
    rows = []
    for timing in benchmark["timings"]:
        sizes = ", ".join(f"{axis}={size}" for axis, size in timing["sizes"].items()) or "static"
        rows.append((
            timing["candidate"], sizes, _ms(timing["mean_ms"]), _ms(timing["p50_ms"]), _ms(timing["p99_ms"]),
            _ms(timing["device_p50_ms"]), f"{timing['requests_per_s']:.1f}", f"{timing['samples_per_s']:.1f}",
            _percent(timing["gpu_utilization_percent"]), _speed_up(timing),
        ))  # fmt: skip
    console = _console()
    print_table(console, headers, rows, drop=("GPU %", "device ms", "mean ms", "requests/s"))
    for name, reason in benchmark["skipped"].items():
        console.print(f"[yellow]{escape(name)}[/] skipped: {escape(reason)}", soft_wrap=True)
    console.print(escape(benchmark["protocol"]["description"]), view.RATIO, style="dim")


def show_inspection(result: Mapping[str, Any]) -> None:
    """What `inspect` found."""
    console = _console()
    for title, value in result.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            table = _table(*value[0], title=title)
            for row in value:
                table.add_row(*(escape(_text(cell)) for cell in row.values()))
            console.print(table)
        elif isinstance(value, dict):
            console.print(f"[bold]{title}[/]  " + escape(", ".join(f"{key}: {_text(v)}" for key, v in value.items())))
        else:
            console.print(f"[bold]{title}[/]  {escape(_text(value))}", soft_wrap=True)


def show_diagnosis(result: Mapping[str, Any]) -> None:
    """What `doctor` found."""
    console = _console()
    show_inspection(result["machine"])
    table = _table("target", "builds", "runs", "tried", "versions")
    words = {True: "[green]yes[/]", False: "[red]no[/]", None: "[dim]-[/]"}
    for target in result["targets"]:
        versions = ", ".join(f"{name} {version}" for name, version in target["versions"].items())
        marks = (words[target[key]] for key in ("builds", "runs", "usable"))
        table.add_row(target["target"], *marks, versions)
    console.print(table)
    for target in result["targets"]:
        _show_reason(console, target["target"], target["reason"], target["to_do"])


def _console() -> Console:
    """Standard output; a log has room for whole tables."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def print_table(
    console: Console,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    drop: Sequence[str],
    caption: str | None = None,
) -> None:
    """Prints a table without the first of `drop`, as many as it takes to fit; all numbers are in the JSON."""
    for count in range(len(drop) + 1):
        kept = [index for index, header in enumerate(headers) if header.lstrip(">") not in drop[:count]]
        table = _table(*(headers[index] for index in kept))
        table.caption = caption
        for row in rows:
            table.add_row(*(row[index] for index in kept))
        if Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width:
            break
    console.print(table)


def _table(*columns: str, title: str | None = None) -> Table:
    """A table; columns whose name begins with ">" are numbers."""
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", no_wrap=True)
    return table


def _at(benchmark: Benchmark | None, sizes: Mapping[str, int]) -> dict[str, Timing]:
    timings = benchmark["timings"] if benchmark else []
    return {timing["candidate"]: timing for timing in timings if timing["sizes"] == sizes}


def _engine_cells(name: str, engine: EngineRecord | None) -> tuple[str, str, str]:
    if engine is None:
        return name, "[dim]baseline[/]", "-"
    validation = engine["validation"]
    errors = [output["relative_l2"] for output in validation["outputs"]] if validation else []
    worst = max((error for error in errors if error is not None), default=None)
    mark = MARKS[validation["passed"]] if validation else f"[yellow]{engine['status']}[/]"
    if engine["dropped"]:
        mark = "[yellow]dropped[/]"
    return name, mark, _number(worst, ".1e")


def _timing_cells(timing: Timing | None) -> tuple[str, ...]:
    if timing is None:
        return ("-",) * 5
    times = (_ms(timing[name]) for name in ("mean_ms", "p50_ms", "p99_ms"))
    return *times, f"{timing['requests_per_s']:.1f}", _speed_up(timing)


def _metric_cells(output: OutputMetrics, floors: Sequence[OutputMetrics]) -> list[str]:
    floor = next((floor for floor in floors if floor["output"] == output["output"]), None)
    numbers = (
        _number(output["relative_l2"], ".1e"), _number(output["max_abs"], ".1e"), _number(output["cosine"], ".6f"),
        _number(output["snr_db"], ".1f", "equal"), _number(output["top1"], ".4f"),
        _number(floor["relative_l2"], ".1e") if floor else "-",
    )  # fmt: skip
    return [MARKS[output["passed"]], *numbers]


def _show_reason(console: Console, name: str, reason: str, to_do: str) -> None:
    if reason:
        console.print(f"[yellow]{name}[/]: {escape(reason)}", soft_wrap=True)
    if to_do:
        console.print(f"  to do: {escape(to_do)}", soft_wrap=True)


def _show_failures(console: Console, validation: Validation | None) -> None:
    if validation and (budget := validation["budget"]) and not budget["holds"]:
        found = budget["problem"] or f"measured {_number(budget['value'], '.4g', 'no number')}"
        console.print(f"[red]{validation['engine']}[/] exceeds the budget {budget['text']}: {escape(found)}")
    for output in validation["outputs"] if validation else []:
        for failure in output["failures"]:
            name = validation["engine"] if validation else ""
            console.print(f"[red]{name}[/], output {escape(output['output'])}: {escape(failure)}", soft_wrap=True)


def _speed_up(timing: Timing) -> str:
    ratio = timing["speed_up"]
    return f"{ratio['ratio']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]".replace("[", r"\[") if ratio else "-"


def _size(engine: EngineRecord | None) -> str:
    return f"{engine['size_bytes'] / 1e6:.1f}" if engine and engine["size_bytes"] else "-"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _number(value: float | None, form: str, missing: str = "-") -> str:
    return missing if value is None else format(value, form)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return str(value)
