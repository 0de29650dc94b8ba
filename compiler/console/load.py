"""Options of `load-test`, and what it found."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ...errors import OutputError, RecipeError, UsageError
from ...serving.client import Client
from ...serving.load.measure import Measurement, Plan, measure
from ...serving.load.payload import Payload, from_bundle, from_file, made_up
from ...serving.load.report import write_report
from ...serving.load.result import Limits, by_percent, keep, result
from ...serving.wire import RemoteModel
from ..batch.latency import parse_latency


def load_options() -> list[click.Parameter]:
    """All options of `load-test`."""
    file, positive = click.Path(path_type=Path), click.FloatRange(0, min_open=True)
    return [
        click.Argument(["urls"], metavar="HOST:PORT...", nargs=-1, required=True),
        click.Option(["--model", "-m"], help="Name of the model. Default: that of the bundle's folder."),
        click.Option(["--bundle", "-b"], type=file, help="Send its recorded samples, and check every answer."),
        click.Option(["--engine", "-e"], help="The engine that is served. Default: the bundle's best."),
        click.Option(["--data"], type=file, help="Send rows of an .npz file of arrays by the names of inputs."),
        click.Option(["--shape"], multiple=True, metavar="NAME:1x3x8", help="Shape of random values for an input."),
        click.Option(["--batch"], type=click.IntRange(1), default=1, show_default=True, help="Rows of a request."),
        click.Option(["--clients"], default="1,8,64", show_default=True, metavar="N,...",
                     help="Closed loops: clients that wait for each answer. Empty for none."),
        click.Option(["--rate", "rates"], type=positive, multiple=True, metavar="N",
                     help="An open loop: requests a second that are due whether others were answered or not."),
        click.Option(["--sweep"], is_flag=True, help="Open loops at rates up to beyond what it can do, for the knee."),
        click.Option(["--constant"], is_flag=True, help="Open loops with even gaps, not as independent users send."),
        click.Option(["--duration"], type=positive, default=10.0, show_default=True, help="Seconds of each loop."),
        click.Option(["--warmup"], type=click.FloatRange(0), default=2.0, show_default=True,
                     help="Seconds before that do not count."),
        click.Option(["--deadline"], type=positive, default=10.0, show_default=True, help="Seconds for an answer."),
        click.Option(["--p99"], metavar="5ms", help="Fail where p99 is more, except at rates of --sweep."),
        click.Option(["--min-throughput"], type=positive, help="Fail where no loop has so many answers a second."),
        click.Option(["--seed"], type=int, default=0, show_default=True, help="Of random values and arrivals."),
        click.Option(["--report"], type=file, metavar="FILE", help="Write a page with all of it."),
        click.Option(["--record"], is_flag=True, help="Keep the result in the bundle, and show it in its report."),
        click.Option(["--tls-root"], type=file, help="PEM file of the roots that the server's certificate comes from."),
        click.Option(["--tls-cert"], type=file, help="PEM file of this client's certificate."),
        click.Option(["--tls-key"], type=file, help="PEM file of its key."),
    ]  # fmt: skip


def load_test(urls: Sequence[str], values: Mapping[str, Any], tell: Callable[[Measurement], None]) -> dict[str, Any]:
    """Runs the test that the options describe; `tell` takes each measurement when it is done.

    Raises:
        UsageError: options that do not go together, or do not fit the model.
        EngineError: no server answers.
    """
    bundle: Path | None = values["bundle"]
    name = values["model"] or (bundle and bundle.resolve().name)
    if not name:
        raise UsageError("which model is to be asked?", expected="--model NAME, or --bundle with a folder of that name")
    if bundle and values["data"]:
        raise UsageError("requests come from a bundle or from data", found="--bundle and --data")
    if values["record"]:
        _check_writable(bundle)
    plan = plan_of(values)
    p99 = values["p99"]
    limits = Limits(parse_latency(p99) if p99 else None, values["min_throughput"])
    tls = {"root": values["tls_root"], "cert": values["tls_cert"], "key": values["tls_key"]}
    with Client(urls, name, deadline_s=plan.deadline_s, **tls) as client:
        payload = _payload(client.model, values)
        found = measure(client.access, payload, plan, tell)
    told = result(found, urls=urls, model=name, payload=payload, limits=limits, bundle=bundle, engine=values["engine"])
    if values["report"]:
        write_report(told, values["report"])
    if values["record"] and bundle:
        keep(told, bundle)
    return told


def _check_writable(bundle: Path | None) -> None:
    """Sees to it before minutes are spent on measuring."""
    if bundle is None:
        raise UsageError("there is no bundle to keep the result in", expected="--bundle", found="--record")
    if bundle.exists() and not os.access(bundle, os.W_OK):
        raise OutputError(f"{bundle} cannot be written", hint="leave out --record; --report writes a page elsewhere")


def plan_of(values: Mapping[str, Any]) -> Plan:
    """What the options want measured.

    Raises:
        RecipeError: nothing, or numbers of clients that cannot be read.
    """
    texts = [text for text in values["clients"].split(",") if text.strip()]
    if any(not re.fullmatch(r"\s*[1-9]\d*\s*", text) for text in texts):
        raise RecipeError("--clients cannot be read", expected="numbers, as 1,8,64", found=values["clients"])
    plan = Plan(
        clients=tuple(int(text) for text in texts),
        rates=tuple(values["rates"]),
        sweep=values["sweep"],
        constant=values["constant"],
        duration_s=values["duration"],
        warmup_s=values["warmup"],
        deadline_s=values["deadline"],
        seed=values["seed"],
    )
    if not plan.clients and (plan.sweep or not plan.rates):
        missing = "a sweep begins with a closed loop" if plan.sweep else "there is nothing to measure"
        raise RecipeError(missing, expected="--clients, or --rate without --sweep")
    return plan


def _payload(model: RemoteModel, values: Mapping[str, Any]) -> Payload:
    rows = values["batch"]
    if values["bundle"]:
        return from_bundle(model, values["bundle"], values["engine"], rows)
    if values["data"]:
        return from_file(model, values["data"], rows)
    return made_up(model, dict(_shape(text) for text in values["shape"]), rows, values["seed"])


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    match = re.fullmatch(r"(.+):(\d+(?:x\d+)*)", text)
    if not match:
        raise RecipeError(f"shape {text!r} cannot be read", expected="NAME:1x3x8", found=text)
    return match.group(1), tuple(int(size) for size in match.group(2).split("x"))


def show_measurement(found: Measurement) -> None:
    """One line, when it is done."""
    summary = found.summary
    times = "  ".join(f"p{p.percent:g} {_number(p.ms)}" for p in summary.percentiles) or "no answer"
    merged = f"  merged {found.server.merged:.1f}" if found.server else ""
    errors = "".join(f"  {count} {name}" for name, count in summary.errors.items())
    click.echo(f"  {found.what:>20}  {summary.achieved:>9,.0f}/s  {times} ms{merged}{errors}")
    if found.doubt:
        click.echo(f"  {'':>20}  {found.doubt}")


def show_load(result: Mapping[str, Any]) -> None:
    """What it comes to."""
    if own := result["engine"]:
        one = next((row for row in result["closed"] if row["clients"] == 1), None)
        p50 = one and by_percent(one, 50.0)
        served = f", served {_number(p50['ms'])} ms" if p50 else ""
        click.echo(f"  {own['name']} by itself takes {_number(own['p50_ms'])} ms at batch {own['batch']}{served}")
    if result["knee"] is not None:
        click.echo(f"  knee at {result['knee']:,.0f} requests/s")
    for problem in result["problems"]:
        click.echo(f"  failed: {problem}")


def _number(ms: float) -> str:
    return f"{ms:.3g}" if math.isfinite(ms) else "?"
