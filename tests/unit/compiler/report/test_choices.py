"""Engines and trials by latency and error."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest

from enginesmith.compiler.report.choices import choices

FOLDER = Path(__file__).parent
example = runpy.run_path(str(FOLDER.parent / "manifest_example.py"))["example"]
made = runpy.run_path(str(FOLDER / "searches_example.py"))
searched, ladder, step, CPU = made["searched"], made["ladder"], made["step"], made["CPU"]


def found(*steps: Any, **values: Any) -> dict[str, Any]:
    """The timed choices of a ladder alone, by name."""
    start = step("captured graph", CPU, f"{CPU}-captured", "start")
    manifest = {**example(), "engines": [], "benchmark": None, "ladder": ladder(start, *steps, **values)}
    return {choice.name.split()[-1]: choice for choice in choices(manifest).timed}


def trial(what: str, p50_ms: float | None, error: float | None, status: str = "reverted") -> Any:
    return step("threads", what, f"{CPU}-{what}", status, 1.0, p50_ms=p50_ms, relative_l2=error)


def test_the_front_has_what_no_other_one_beats_in_both() -> None:
    points = [
        ("slow", 4.0, 1e-7),
        ("fast", 1.0, 1e-2),
        ("beaten", 5.0, 1e-3),
        ("middle", 2.0, 1e-4),
        ("same", 2.0, 2e-4),
    ]
    by_name = found(*(trial(*point) for point in points))
    assert {name for name, choice in by_name.items() if choice.front} == {"fast", "middle", "slow"}
    assert [choice.number for choice in by_name.values()] == [1, 2, 3, 4, 5]
    assert list(by_name) == ["fast", "middle", "same", "slow", "beaten"]


def test_engines_and_trials_each_once_with_the_pick_under_its_last_name() -> None:
    result = choices(searched(example()))
    states = {choice.name: choice.state for choice in result.timed}
    assert states == {
        f"{CPU}-int8-tuned": "picked",
        f"{CPU}, threads threads=1": "beaten",
        f"{CPU}, threads threads=2": "beaten",
        f"{CPU}, quantization int8 quantize-static": "beaten",
        f"{CPU}-fp32": "on the front",
        f"{CPU}, captured graph": "beaten",
        f"{CPU}, quantization int8-dynamic": "beaten",
        "torchscript-fp32": "on the front",
        f"{CPU}-fp16": "not close enough",
    }
    assert [(choice.name, choice.state) for choice in result.untimed] == [
        (f"{CPU}, pruning prune:macs=0.75", "not close enough")
    ]
    assert (result.where, result.baseline, result.budget, result.bound) == (
        " at batch 8",
        "torch-eager",
        "top1=0.99",
        None,
    )
    assert result.baseline_ms == pytest.approx(0.412 * 3.1)


def test_what_is_wrong_is_never_on_the_front() -> None:
    manifest = example()
    for timing in manifest["benchmark"]["timings"]:
        if timing["candidate"] == f"{CPU}-fp16":
            timing["p50_ms"] = 1e-3
    fastest = choices(manifest).timed[0]
    assert (fastest.name, fastest.front, fastest.state) == (f"{CPU}-fp16", False, "not close enough")


def test_the_ladder_times_a_pick_that_the_benchmark_left_out() -> None:
    manifest = searched(example())
    manifest["benchmark"] = None
    by_name = {choice.name: choice.p50_ms for choice in choices(manifest).timed}
    assert by_name[f"{CPU}-int8-tuned"] == 0.138
    assert by_name[f"{CPU}-fp32"] == 0.375


def test_throughput_is_compared_at_the_largest_batch() -> None:
    manifest = {**searched(example()), "ladder": ladder(objective="throughput")}
    result = choices(manifest)
    assert result.where == " at batch 64"
    assert result.baseline_ms == pytest.approx(0.412 * 19.4)


def test_a_budget_on_the_error_is_a_bound() -> None:
    budget = {"text": "relative_l2=0.02", "value": 0.01, "holds": True, "problem": ""}
    manifest = {**example(), "engines": [], "ladder": ladder({**trial("a", 1.0, 0.01), "budget": budget})}
    assert choices(manifest).bound == 0.02


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, 0.0, -1.0])
def test_what_was_not_timed_or_not_judged_is_no_point(bad: float | None) -> None:
    assert list(found(trial("a", bad, 0.1), trial("b", 1.0, 0.1))) == ["b"]
    if bad != 0.0 and bad != -1.0:
        assert list(found(trial("a", 1.0, bad), trial("b", 1.0, 0.1))) == ["b"]


def test_a_manifest_of_nothing_has_no_choices() -> None:
    result = choices({**example(), "signature": {}, "engines": [], "benchmark": None})
    assert (result.timed, result.untimed, result.where) == ((), (), "")
