"""What the verdict says beside passed or failed."""

from __future__ import annotations

import runpy
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from enginesmith.compiler.recipe import make_recipe
from enginesmith.compiler.signature import Signature
from enginesmith.compiler.trial import try_metric, verdict
from enginesmith.errors import RecipeError

example = runpy.run_path(str(Path(__file__).with_name("manifest_example.py")))["example"]


def notes(p50_ms: dict[str, dict[int, float]], **precisions: str) -> list[str]:
    """Of engines of one target, by name, with their median at each batch."""
    manifest = example()
    engine, benchmark = manifest["engines"][0], manifest["benchmark"]
    engines: list[Any] = [
        {**engine, "name": name, "target": "cpu", "precision": precision} for name, precision in precisions.items()
    ]
    timing = benchmark["timings"][0]
    benchmark["timings"] = [
        {**timing, "candidate": name, "batch": batch, "sizes": {"batch": batch}, "p50_ms": value}
        for name, times in p50_ms.items()
        for batch, value in times.items()
    ]
    found: list[str] = verdict(engines, benchmark, Signature.from_json(manifest["signature"]), ["first"])["notes"]
    assert found[0] == "first"
    return found[1:]


def test_slower_engines_are_named_with_the_sizes_where_they_are() -> None:
    times = {"full": {1: 1.0, 8: 10.0}, "low": {1: 1.5, 8: 5.0}, "other": {1: 1.0, 8: 10.2}}
    assert notes(times, full="fp32", low="int8", other="fp16") == [
        "low is slower than full: 1.50 times its time at batch 1"
    ]


def test_an_engine_without_its_like_in_full_precision_is_named() -> None:
    assert notes({"low": {1: 1.0}}, low="int8") == [
        "low was not compared with fp32 on the same target; add --precision fp32"
    ]


@pytest.mark.parametrize("times", [{}, {"full": {1: 1.0}}])
def test_nothing_is_said_of_what_was_not_measured(times: dict[str, dict[int, float]]) -> None:
    assert notes(times, full="fp32", low="int8") == []


def test_a_goal_that_is_missed_makes_the_verdict_negative() -> None:
    manifest = example()
    engines = [
        engine for engine in manifest["engines"] if engine["status"] == "ready" and engine["validation"]["passed"]
    ]
    arguments: Any = (engines, manifest["benchmark"], Signature.from_json(manifest["signature"]))
    assert verdict(*arguments)["passed"]
    found = verdict(*arguments, missed="no batch size keeps a p99 of 5 ms")
    assert (found["passed"], found["state"], found["reasons"]) == (
        False,
        "failed",
        ["no batch size keeps a p99 of 5 ms"],
    )


def test_a_metric_is_tried_on_the_reference_before_anything_long(tmp_path: Path) -> None:
    probe = types.SimpleNamespace(probe=True)
    sample = types.SimpleNamespace(
        probe=False, outputs={"logits": np.zeros((2, 3))}, inputs={"ids": np.zeros((2, 4))}, labels={}
    )
    reference: Any = [probe, sample]
    with pytest.raises(RecipeError, match="metric perplexity needs the token that follows each prompt"):
        try_metric(make_recipe({"metric": "perplexity"}), reference)
    sample.labels["next"] = np.array([0, 2])
    try_metric(make_recipe({"metric": "perplexity"}), reference)
    try_metric(make_recipe({}), [])  # type: ignore[arg-type]
