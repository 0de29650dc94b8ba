"""Engines are ranked by what they were compiled for."""

from __future__ import annotations

from typing import Any

import pytest

from enginesmith.compiler.engine import ranked
from enginesmith.compiler.ladder.objective import Objective
from enginesmith.compiler.ranking import decisive, objective_of
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.compiler.trial import verdict

SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", 4)),), (TensorSpec("y", "float32", ("batch", 4)),),
    {"batch": AxisRange(1, 8, 64)},
)  # fmt: skip
TIMES = {"quick": {8: 1.0, 64: 9.0}, "wide": {8: 2.0, 64: 5.0}, "small": {8: 3.0, 64: 9.5}, "wrong": {8: 0.1, 64: 0.1}}
BYTES = {"quick": 900, "wide": 800, "small": 100, "wrong": 1}


def manifest(objective: str | None) -> Any:
    """Of engines of which each is the best by one objective, and one that is wrong."""
    engines = [
        {
            "name": name, "target": "cpu", "precision": "fp32", "status": "ready", "reason": "", "build_s": 1.0,
            "size_bytes": BYTES[name], "details": {}, "dropped": "", "sibling": None,
            "validation": {"passed": name != "wrong", "outputs": [], "budget": None},
        }
        for name in TIMES
    ]  # fmt: skip
    timings = [
        {"candidate": name, "batch": batch, "sizes": {"batch": batch}, "p50_ms": p50_ms, "speed_up": None,
         "against_sibling": None}
        for name, times in TIMES.items()
        for batch, p50_ms in times.items()
    ]  # fmt: skip
    ladder = {"objective": objective} if objective else None
    return {"engines": engines, "benchmark": {"timings": timings}, "signature": SIGNATURE.to_json(), "ladder": ladder}


@pytest.mark.parametrize(
    ("objective", "best"),
    [(None, "quick"), ("latency", "quick"), ("throughput", "wide"), ("size", "small"), ("size=0.5", "small")],
)
def test_the_best_is_so_by_the_objective(objective, best):
    found = manifest(objective)
    assert ranked(found)[0]["name"] == best
    asked = objective_of(found["ladder"])
    assert verdict(found["engines"], found["benchmark"], SIGNATURE, objective=asked)["best"] == best


def test_equal_sizes_are_ranked_by_latency():
    found = manifest("size")
    for engine in found["engines"]:
        engine["size_bytes"] = 5
    assert [record["name"] for record in ranked(found)] == ["quick", "wide", "small"]


def test_caches_count_with_the_files(monkeypatch):
    found = manifest("size")
    monkeypatch.setattr("enginesmith.compiler.ladder.objective.most_rows", lambda signature: 10)
    signature = {**found["signature"], "states": {"x": "y"}}
    for engine in found["engines"]:
        engine["details"] = {"cache_row_bytes": 1000 if engine["name"] == "small" else 10}
    assert ranked({**found, "signature": signature})[0]["name"] == "wide"


def test_where_the_largest_batch_was_not_timed_the_usual_one_decides():
    found = manifest("throughput")
    timings = [timing for timing in found["benchmark"]["timings"] if timing["batch"] == 8]
    assert decisive({"timings": timings}, SIGNATURE, Objective("throughput"))["quick"]["p50_ms"] == 1.0
    assert decisive(None, SIGNATURE, Objective("throughput")) == {}
