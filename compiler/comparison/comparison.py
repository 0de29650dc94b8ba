"""The whole comparison: find both engines, compare what they give, time them interleaved, judge."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UnknownNameError
from ..manifest import Benchmark
from ..progress import Progress, Stages
from ..recipe import make_recipe
from .checks import accuracy_checks, growth_checks, result_checks, speed_checks, verdict
from .pair import pair
from .place import Place
from .records import Comparison, SideRecord
from .results import look
from .rules import Rules
from .speed import timed

FIELDS = (
    "benchmark", "data", "max_samples", "metric", "rounds", "seed", "slice_s", "tolerances", "with_transfers",
)  # fmt: skip
"""Fields of the recipe that a comparison takes."""

BESIDE = ("accuracy.json", "build.log", "engine.json", "reproduce.sh", "results.json")
"""Files in the folder of an engine that it does not need to run, or that only tell of it."""


def compare(
    a: str | Path,
    b: str | Path,
    *,
    sizes: Sequence[Mapping[str, int]] = (),
    rules: Rules | None = None,
    progress: Progress | None = None,
    **fields: Any,
) -> Comparison:
    """Compares B with A, and says whether B regressed.

    Args:
        a: what is there: a bundle (its best engine here), ``BUNDLE#ENGINE``, or the folder of an engine.
        b: what may take its place, likewise.
        sizes: sizes of the dynamic axes to time at; by default those of either that both take.
        rules: what counts as a regression.
        fields: those of `FIELDS`. `data` are the inputs of both, by default those of B's record of the reference;
            `tolerances` take the place of the bounds that the engines were compiled with.

    Raises:
        UsageError: no bundle or engine, different signatures, sizes or data that do not fit both.
        EngineError: an engine cannot run here, or nothing could be timed.
    """
    start = time.perf_counter()
    rules = rules or Rules()
    for name in fields:
        if name not in FIELDS:
            raise UnknownNameError("field of a comparison", name, FIELDS)
    recipe = make_recipe(fields, "call")
    stages = Stages(progress or Progress(), 2 + recipe.benchmark)
    with stages("open engines"):
        both = pair(a, b, sizes, recipe)
    with stages("compare results"):
        results, notes = look(both, recipe, fields)
    times = None
    if recipe.benchmark:
        with stages("measure speed"):
            times = timed(both, recipe, stages.update)
    records = _side(str(a), both.a, times, "A"), _side(str(b), both.b, times, "B")
    checks = [
        *(speed_checks(times, rules) if times else []),
        *accuracy_checks(results, rules),
        *result_checks(results, rules),
        *growth_checks(*records, rules),
    ]
    same = _same_model(*records)
    if same is False:
        notes.append("A and B were made from different models or weights: each was judged on its own reference")
    if results["a"] is not None and not results["a"]["passed"]:
        notes.append("A itself is not within its bounds")
    if both.samples.random:
        notes.append("inputs were random: give --data for a verdict on real ones")
    return Comparison(
        a=records[0],
        b=records[1],
        same_model=same,
        rules=dataclasses.asdict(rules),
        verdict=verdict(checks),
        checks=checks,
        results=results,
        benchmark=times,
        notes=notes,
        seconds=time.perf_counter() - start,
    )


def _side(text: str, place: Place, timed: Benchmark | None, label: str) -> SideRecord:
    memory = [t["gpu_memory_bytes"] for t in timed["timings"] if t["candidate"] == label] if timed else []
    manifest = place.bundle.manifest if place.bundle else None
    return SideRecord(
        path=text,
        engine=place.info.name,
        target=place.info.target,
        precision=place.info.precision,
        created=manifest["created"] if manifest else "",
        fingerprint=str(manifest["source"]["fingerprint"]) if manifest else "",
        size_bytes=sum(f.stat().st_size for f in place.folder.rglob("*") if f.is_file() and f.name not in BESIDE),
        gpu_memory_bytes=max((size for size in memory if size is not None), default=None),
    )


def _same_model(a: SideRecord, b: SideRecord) -> bool | None:
    if not a["fingerprint"] or not b["fingerprint"]:
        return None
    return a["fingerprint"] == b["fingerprint"]
