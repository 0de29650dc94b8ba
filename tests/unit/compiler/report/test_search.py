"""What the ladder did, in order and in words."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest

from enginesmith.compiler.report.search import climbs, explained

made = runpy.run_path(str(Path(__file__).with_name("searches_example.py")))
ladder, step, CPU = made["ladder"], made["step"], made["CPU"]
TIMES = "\N{MULTIPLICATION SIGN}"


def start(**values: Any) -> Any:
    return step("captured graph", CPU, f"{CPU}-captured", "start", **values)


def test_a_target_in_a_sentence() -> None:
    cpu, rtx = climbs(ladder())
    total = f"{1.04 * 1.9 * 1.3 * 1.1:.2f}{TIMES}"
    assert cpu.sentence == (
        f"{CPU}: 4 of 8 steps kept, {total} the speed of the captured graph; "
        f"int8 was 1.90{TIMES} and stayed within top1=0.99"
    )
    assert cpu.pick == f"{CPU}-int8-tuned"
    assert rtx.sentence == "tensorrt-rtx: 1 of 1 step kept, 1 of them not measured"
    assert rtx.total is None


def test_each_step_begins_at_the_level_of_the_engine_it_was_raced_against() -> None:
    levels = {tried.step["what"]: tried for tried in climbs(ladder())[0].tried}
    int8, dynamic, one, two = (
        levels[name] for name in ("int8 quantize-static", "int8-dynamic", "threads=1", "threads=2")
    )
    assert int8.before == dynamic.before == 1.04
    assert int8.after == one.before == two.before == pytest.approx(1.04 * 1.9)
    assert dynamic.after == pytest.approx(1.04 * 0.8)
    assert levels["execution=parallel"].before == one.after == pytest.approx(1.04 * 1.9 * 1.3)


def test_the_level_is_that_of_the_engine_which_a_name_meant_last() -> None:
    """Names of engines that were removed are given again."""
    names = ("a", "b", "a", "b")
    raced = [
        step(f"rung {index}", f"{index}", name, "kept", 2.0, against=([f"{CPU}-captured", *names])[index])
        for index, name in enumerate(names)
    ]
    (climb,) = climbs(ladder(start(), *raced, picks={CPU: "b"}))
    assert [tried.after for tried in climb.tried[1:]] == [2.0, 4.0, 8.0, 16.0]


def test_what_stays_comes_last_of_its_rung() -> None:
    texts = [tried.step["what"] for tried in climbs(ladder())[0].tried]
    assert texts.index("int8-dynamic") < texts.index("int8 quantize-static")
    assert texts.index("threads=2") < texts.index("threads=1")


def test_verdicts() -> None:
    verdicts = {tried.step["what"]: tried.verdict for climb in climbs(ladder()) for tried in climb.tried}
    assert verdicts == {
        CPU: "start",
        "simplify dedupe": "kept: later steps need it",
        "bf16": "failed",
        "int8-dynamic": "reverted: slower",
        "int8 quantize-static": "kept",
        "prune:macs=0.75": "reverted: not close enough",
        "2:4": "left out",
        "threads=2": "reverted: no clear gain",
        "threads=1": "kept",
        "execution=parallel": "kept",
        "tensorrt-rtx": "start",
        "fp16, bf16": "left out",
        "align:multiple=8": "kept, not measured",
    }


@pytest.mark.parametrize(
    ("objective", "ratio", "kept", "verdict"),
    [
        ("latency", 1.5, 1.6, "reverted: another was faster"),
        ("throughput", 1.5, 1.6, "reverted: another was faster"),
        ("latency", 1.01, 1.6, "reverted: no clear gain"),
        ("size=0.5", 1.5, None, "reverted: not smaller by enough"),
        ("size", 0.9, None, "reverted: larger"),
        ("size", 1.5, 1.6, "reverted: another was smaller"),
    ],
)
def test_verdicts_of_what_lost(objective: str, ratio: float, kept: float | None, verdict: str) -> None:
    rung = [step("precision", "fp16", "a", "reverted", ratio), step("precision", "bf16", "b", "kept", kept or 1.0)]
    (climb,) = climbs(ladder(start(), *rung[: 2 if kept else 1], picks={CPU: "b"}, objective=objective))
    assert climb.tried[1].verdict == verdict


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("latency", f"2.00{TIMES} the speed of the captured graph"),
        ("throughput", f"2.00{TIMES} the throughput of the captured graph"),
        ("size=0.3", f"2.00{TIMES} smaller than the captured graph"),
    ],
)
def test_the_total_is_told_in_terms_of_the_objective(objective: str, words: str) -> None:
    raced = step("precision", "fp16", "a", "kept", 2.0)
    (climb,) = climbs(ladder(start(), raced, picks={CPU: "a"}, objective=objective))
    assert climb.sentence == f"{CPU}: 1 of 1 step kept, {words}"


def test_a_target_without_an_engine_says_why() -> None:
    failed = step("captured graph", CPU, f"{CPU}-fp32", "failed", reason="not close enough: NaN")
    (climb,) = climbs(ladder(failed, picks={"other": "other-fp32"}))
    assert climb.sentence == f"{CPU}: no engine: not close enough: NaN"


def test_a_target_that_nothing_was_tried_on() -> None:
    (climb,) = climbs(ladder(start(), picks={CPU: f"{CPU}-fp32"}))
    assert climb.sentence == f"{CPU}: no step was tried"
    (climb,) = climbs(ladder(start(), step("precision", "fp16", "", "skipped"), picks={CPU: f"{CPU}-fp32"}))
    assert climb.sentence == f"{CPU}: no step was tried"


def test_a_target_that_is_climbed_twice_is_told_twice() -> None:
    twice = [
        step("captured graph", name, f"{CPU}-captured", "start") if begins else step("simplify", "", name, "kept", 2.0)
        for name in (f"{CPU}-fp32", f"{CPU}-2-fp32")
        for begins in (True, False)
    ]
    found = climbs(ladder(*twice, picks={CPU: f"{CPU}-fp32", f"{CPU}-2": f"{CPU}-2-fp32"}))
    assert [(climb.target, climb.pick, len(climb.tried)) for climb in found] == [
        (CPU, f"{CPU}-fp32", 2),
        (f"{CPU}-2", f"{CPU}-2-fp32", 2),
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_a_ratio_that_is_none_moves_nothing(bad: float) -> None:
    steps = [step("precision", "fp16", "a", "kept", bad), step("threads", "2", "b", "kept", 2.0, against="a")]
    (climb,) = climbs(ladder(start(), *steps, picks={CPU: "b"}))
    assert [tried.after for tried in climb.tried] == [None, None, 2.0]
    assert climb.total == 2.0


def test_reasons_are_given_where_the_numbers_do_not_tell() -> None:
    reasons = {tried.step["what"]: explained(tried) for tried in climbs(ladder())[0].tried}
    assert reasons["2:4"] == "it needs calibration data"
    assert reasons["simplify dedupe"].endswith("it stays, as all later steps build on it")
    assert reasons["threads=1"] == ""
