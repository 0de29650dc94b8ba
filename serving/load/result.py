"""A load test as JSON, beside the engine's own numbers, and its verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

from ...compiler.bundle import amending
from ...compiler.engine import ranked, read_manifest
from ...compiler.manifest import Manifest, ServiceRecord
from .answers import WRONG, Summary
from .knee import keeps_up, knee, within
from .measure import Measurement
from .payload import Payload


@dataclasses.dataclass(frozen=True)
class Limits:
    """What makes the verdict bad, where it is given."""

    p99_ms: float | None = None
    min_throughput: float | None = None


def result(
    found: Sequence[Measurement],
    *,
    urls: Sequence[str],
    model: str,
    payload: Payload,
    limits: Limits,
    bundle: Path | None,
    engine: str | None,
) -> dict[str, Any]:
    """Everything that was found; see `ServiceRecord`. `problems` are empty where the verdict is good."""
    opened = [measured for measured in found if measured.clients is None]
    rates = [measured.summary for measured in opened]
    at = knee(rates) if len(rates) > 2 else None
    fine = within(rates, limits.p99_ms) if rates and limits.p99_ms else None
    manifest = read_manifest(bundle) if bundle else None
    served = (engine or next((record["name"] for record in ranked(manifest)), None)) if manifest else None
    own = _own(manifest, served, payload.rows) if manifest and served else None
    one = next((measured.summary for measured in found if measured.clients == 1), None)
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "served": served,
        "urls": list(urls),
        "model": model,
        "payload": {"what": payload.what, "requests": len(payload.messages), "rows": payload.rows,
                    "checked": bool(payload.expected)},
        "closed": [_measured(measured) for measured in found if measured.clients is not None],
        "open": [_measured(measured) for measured in opened],
        "knee": None if at is None else rates[at].offered,
        "within_p99": None if fine is None else rates[fine].offered,
        "limits": dataclasses.asdict(limits),
        "engine": own,
        "overhead_ms": one.p(50.0) - own["p50_ms"] if own and one and one.answered else None,
        "problems": _problems(found, limits),
    }  # fmt: skip


def _measured(found: Measurement) -> dict[str, Any]:
    summary = found.summary
    return {
        "what": found.what,
        "clients": found.clients,
        "offered": summary.offered,
        "achieved": summary.achieved,
        "keeps_up": keeps_up(summary),
        "answered": summary.answered,
        "seconds": summary.seconds,
        "mean_ms": _finite(summary.mean_ms),
        "percentiles": [dataclasses.asdict(percentile) for percentile in summary.percentiles],
        "errors": dict(summary.errors),
        "late_ms": summary.late_ms,
        "server": found.server and dataclasses.asdict(found.server),
        "client_cpu": found.client_cpu,
        "doubt": found.doubt,
    }


def keep(found: Mapping[str, Any], bundle: Path) -> None:
    """Adds a result to the bundle and its report, in place of an older one of the same engine and rows.

    Raises:
        OutputError, StorageError: the bundle cannot be written.
    """
    record = cast("ServiceRecord", found)
    with amending(bundle) as manifest:
        others = [other for other in manifest.get("services", ()) if _subject(other) != _subject(record)]
        manifest["services"] = [*others, record]


def _subject(record: ServiceRecord) -> tuple[str, int]:
    return record["served"], record["payload"]["rows"]


def _own(manifest: Manifest, name: str, rows: int) -> dict[str, Any] | None:
    """The engine's own times in the bundle's benchmark, at the batch of a request; None where it has none."""
    benchmark = manifest["benchmark"]
    for timing in benchmark["timings"] if benchmark else []:
        if timing["candidate"] == name and timing["batch"] == rows:
            return {"name": name, "batch": rows, "p50_ms": timing["p50_ms"], "p99_ms": timing["p99_ms"],
                    "samples_per_s": timing["samples_per_s"]}  # fmt: skip
    return None


def _problems(found: Sequence[Measurement], limits: Limits) -> list[str]:
    """Wrong answers anywhere; errors where the service was not asked for more than it can; limits that are missed.

    A limit on p99 binds the closed loops and the rates that were asked for, not those of a sweep, which goes too far on
    purpose; a limit on throughput binds the best of all.
    """
    problems = []
    for measured in found:
        if wrong := measured.summary.errors.get(WRONG):
            problems.append(f"{wrong} wrong answers at {measured.what}")
        if not measured.summary.answered:
            problems.append(f"no right answer at {measured.what}: {_named(measured.summary)}")
    bound = [measured for measured in found if measured.bound]
    if limits.p99_ms is not None:
        problems += [
            f"p99 is {measured.summary.p(99.0):.3g} ms at {measured.what}, more than {limits.p99_ms:g}"
            for measured in bound
            if measured.summary.answered and measured.summary.p(99.0) > limits.p99_ms
        ]
    problems += [
        f"only {measured.summary.achieved:,.0f} of {measured.what} were answered rightly: {_named(measured.summary)}"
        for measured in bound
        if measured.summary.answered and not keeps_up(measured.summary)
    ]
    best = max((measured.summary.achieved for measured in found), default=0.0)
    if limits.min_throughput is not None and best < limits.min_throughput:
        problems.append(f"{best:,.0f} requests/s at the most, less than {limits.min_throughput:g}")
    return problems


def _named(summary: Summary) -> str:
    return ", ".join(f"{count} {_words(outcome)}" for outcome, count in summary.errors.items()) or "too slow"


def _words(outcome: str) -> str:
    return outcome.lower().replace("_", " ")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def by_percent(measured: Mapping[str, Any], percent: float) -> Mapping[str, Any] | None:
    """A percentile of a measurement in the result; None where nothing was answered."""
    return next((found for found in measured["percentiles"] if found["percent"] == percent), None)
