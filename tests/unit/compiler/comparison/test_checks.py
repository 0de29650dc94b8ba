"""From numbers to a verdict."""

from __future__ import annotations

from typing import Any

import pytest

from enginesmith.compiler.comparison.checks import (
    accuracy_checks,
    growth_checks,
    result_checks,
    speed_checks,
    speed_verdict,
    verdict,
)
from enginesmith.compiler.comparison.rules import Rules
from enginesmith.compiler.validation.metrics import TOLERANCES
from enginesmith.errors import RecipeError, UnknownNameError


def timing(label: str, batch: int, low: float = 1.0, high: float = 1.0) -> Any:
    ratio = {"against": "A", "ratio": (low + high) / 2, "low": low, "high": high}
    return {
        "candidate": label,
        "sizes": {"batch": batch},
        "iterations": 100,
        "mean_ms": 10.0,
        "p50_ms": 9.0,
        "p99_ms": 20.0,
        "samples_per_s": 100.0,
        "device_p50_ms": None,
        "speed_up": ratio if label == "B" else None,
    }


def benchmark(*intervals: tuple[float, float], skipped: dict[str, str] | None = None) -> Any:
    timings = []
    for number, interval in enumerate(intervals):
        timings += [timing("A", 2**number), timing("B", 2**number, *interval)]
    return {"timings": timings, "skipped": skipped or {}}


def output(name: str = "y", error: float | None = 1e-6, *failures: str) -> Any:
    numbers = {"relative_l2": error, "max_abs": error, "cosine": 1.0, "snr_db": None, "nan": 0, "inf": 0}
    return {"output": name, **numbers, "top1": None, "top5": None, "passed": not failures, "failures": list(failures)}


def validation(*outputs: Any, budget: Any = None) -> Any:
    return {
        "engine": "e",
        "passed": all(one["passed"] for one in outputs),
        "outputs": list(outputs),
        "tolerance": TOLERANCES["fp32"],
        "budget": budget,
    }


def results(a: Any = None, b: Any = None, between: Any = None, metric: Any = None) -> Any:
    return {
        "inputs": "data",
        "samples": 3,
        "a": a,
        "b": b,
        "between": [output()] if between is None else between,
        "tolerance": TOLERANCES["fp32"],
        "own_record": {"a": True, "b": True},
        "metric": metric,
    }


def words(checks: list[Any]) -> list[tuple[str, str]]:
    return [(check["verdict"], check["state"]) for check in checks]


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        (1.03, 1.2, "faster"),
        (1.02, 1.2, "unclear"),
        (0.7, 0.97, "slower"),
        (0.7, 0.981, "unclear"),
        (0.99, 1.01, "equal"),
        (0.9, 1.1, "unclear"),
    ],
)
def test_the_whole_interval_decides(low: float, high: float, found: str) -> None:
    assert speed_verdict({"against": "A", "ratio": 1, "low": low, "high": high}, 1.02) == found


def test_slower_at_one_size_fails() -> None:
    checks = speed_checks(benchmark((1.5, 1.6), (0.8, 0.9)), Rules())
    assert words(checks) == [("faster", "passed"), ("slower", "failed")]
    assert checks[1]["name"] == "batch=2"
    assert checks[1]["seconds"] == 2.0
    assert checks[1]["numbers"]["high"] == 0.9
    found = verdict(checks)
    assert (found["passed"], found["speed"]) == (False, "mixed")
    assert found["reasons"][0].startswith("speed, batch=2: slower: 0.850 times as fast as A, 95 % interval 0.800 to")


def test_tolerance_and_kinds_are_the_users() -> None:
    slower = benchmark((0.8, 0.9))
    assert words(speed_checks(slower, Rules(tolerance_speed=1.3))) == [("equal", "passed")]
    assert words(speed_checks(slower, Rules(fail_on=("accuracy",)))) == [("slower", "information")]


@pytest.mark.parametrize(
    ("intervals", "found"),
    [
        ([(1.1, 1.2), (1.0, 1.0)], "faster"),
        ([(1.0, 1.0), (0.99, 1.01)], "equal"),
        ([(1.0, 1.0), (0.9, 1.1)], "unclear"),
        ([(0.5, 0.6)], "slower"),
    ],
)
def test_all_sizes_make_one_word(intervals: Any, found: str) -> None:
    assert verdict(speed_checks(benchmark(*intervals), Rules()))["speed"] == found


def test_where_b_fails_and_a_runs_is_a_regression_and_the_reverse_is_none() -> None:
    alone = {"timings": [timing("A", 4), timing("B", 8)], "skipped": {"B batch=4": "no kernel", "A batch=8": "too big"}}
    alone["timings"][1]["speed_up"] = None
    checks = speed_checks(alone, Rules())  # type: ignore[arg-type]
    assert words(checks) == [("fails", "failed"), ("not measured", "skipped")]
    assert [check["text"] for check in checks] == ["B was not timed: no kernel", "A was not timed: too big"]
    assert verdict(checks)["text"].startswith("B fails where A runs")
    never = {"timings": [timing("A", 4)], "skipped": {"B": "driver too old"}}
    assert speed_checks(never, Rules())[0]["text"] == "B was not timed: driver too old"  # type: ignore[arg-type]


def test_b_beyond_its_own_bounds_is_worse() -> None:
    wrong = output("y", 0.5, "relative_l2 is 0.5, allowed 0.0001")
    checks = accuracy_checks(results(validation(output()), validation(wrong)), Rules())
    assert words(checks) == [("worse", "failed")]
    assert checks[0]["text"] == ("relative L2 0.5 from the reference, A 1e-06; relative_l2 is 0.5, allowed 0.0001")
    assert verdict(checks)["accuracy"] == "worse"


def test_within_its_bounds_b_may_be_worse_unless_it_is_said_by_how_much() -> None:
    both = results(validation(output(error=1e-6)), validation(output(error=9e-5)))
    assert words(accuracy_checks(both, Rules())) == [("within bounds", "passed")]
    assert words(accuracy_checks(both, Rules(tolerance_accuracy=1e-4))) == [("within bounds", "passed")]
    checks = accuracy_checks(both, Rules(tolerance_accuracy=5e-5))
    assert words(checks) == [("worse", "failed")]
    assert checks[0]["text"].endswith("8.9e-05 more than A, 5e-05 allowed")


def test_a_budget_that_does_not_hold_is_worse() -> None:
    budget = {"text": "metric=0.003", "value": 0.01, "holds": False, "problem": ""}
    checks = accuracy_checks(results(None, validation(output(), budget=budget)), Rules())
    assert words(checks) == [("within bounds", "passed"), ("worse", "failed")]
    assert (checks[1]["name"], checks[1]["text"]) == ("budget metric=0.003", "measured 0.01")
    broken = {**budget, "value": None, "problem": "output 'y': NaN"}
    assert accuracy_checks(results(None, validation(budget=broken)), Rules())[0]["text"] == "output 'y': NaN"


@pytest.mark.parametrize(
    ("low", "high", "allowed", "state"),
    [
        (-0.02, -0.01, 0.0, "failed"),
        (-0.02, 0.001, 0.0, "passed"),
        (0.0, 0.0, 0.0, "passed"),
        (-0.02, -0.01, 0.01, "passed"),
        (-0.02, -0.011, 0.01, "failed"),
        (0.1, 0.2, 0.0, "passed"),
    ],
)
def test_the_metric_is_worse_where_its_whole_interval_is(low: float, high: float, allowed: float, state: str) -> None:
    metric = {"name": "accuracy", "a": 0.9, "b": 0.88, "change": -0.02, "low": low, "high": high, "rows": 100}
    (check,) = accuracy_checks(results(metric=metric), Rules(tolerance_metric=allowed))
    assert check["state"] == state
    assert check["name"] == "metric accuracy"
    assert "on 100 rows" in check["text"]


def test_a_metric_that_is_not_finite_is_worse() -> None:
    metric = {"name": "accuracy", "a": 0.9, "b": None, "change": None, "low": None, "high": None, "rows": 100}
    (check,) = accuracy_checks(results(metric=metric), Rules())
    assert (check["state"], check["text"]) == ("failed", "B's is not finite, A's is 0.9000")


def test_other_results_are_information_unless_they_count_or_nothing_else_says_what_is_right() -> None:
    other = [output("y", 0.5, "relative_l2 is 0.5, allowed 0.0001")]
    judged = results(b=validation(output()), between=other)
    assert words(result_checks(judged, Rules())) == [("different", "information")]
    assert words(result_checks(judged, Rules(fail_on=("results",)))) == [("different", "failed")]
    found = verdict([*accuracy_checks(judged, Rules()), *result_checks(judged, Rules())])
    assert (found["passed"], found["results"], found["accuracy"]) == (True, "different", "within bounds")
    assert found["text"] == "speed was not measured; different results"
    (check,) = result_checks(results(between=other), Rules())
    assert (check["kind"], check["name"], check["state"]) == ("accuracy", "y beside A's", "failed")
    assert verdict([check])["text"] == "speed was not measured; different results, beyond its bounds"


def side(size: int, memory: int | None = None) -> Any:
    return {"size_bytes": size, "gpu_memory_bytes": memory}


def test_growth_is_information_until_a_limit_is_set() -> None:
    assert words(growth_checks(side(100), side(150), Rules())) == [("larger", "information")]
    assert words(growth_checks(side(100), side(150), Rules(max_growth=0.4))) == [("larger", "failed")]
    assert words(growth_checks(side(100), side(150), Rules(max_growth=0.5))) == [("equal", "passed")]
    assert words(growth_checks(side(100), side(50), Rules(max_growth=0.0))) == [("smaller", "passed")]
    checks = growth_checks(side(100, 10), side(100, 30), Rules(max_growth=1.0))
    assert [(check["name"], check["verdict"]) for check in checks] == [
        ("size of the engine", "equal"),
        ("GPU memory", "larger"),
    ]
    assert checks[1]["text"] == "3e-05 MB, A 1e-05 MB: +200.0%, 100.0% allowed"


@pytest.mark.parametrize("wrong", [0.9, float("nan"), float("inf")])
def test_a_tolerance_of_speed_that_cannot_be_is_refused(wrong: float) -> None:
    with pytest.raises(RecipeError, match="tolerance of speed is no ratio"):
        Rules(tolerance_speed=wrong)


@pytest.mark.parametrize("name", ["tolerance_accuracy", "tolerance_metric", "max_growth"])
def test_a_bound_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name.replace('_', '-')} is no bound"):
        Rules(**{name: -0.1})


def test_a_kind_that_does_not_exist_gets_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown kind of regression 'sped'(?s:.)*did you mean 'speed'"):
        Rules(fail_on=("sped",))
