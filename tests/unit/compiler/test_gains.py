"""What becomes of engines that have to beat a sibling."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from enginesmith.compiler.gains import drop, is_lossy, judged_as
from enginesmith.compiler.signature import Signature, TensorSpec
from enginesmith.compiler.trial import verdict
from enginesmith.targets.base import EngineInfo

example = runpy.run_path(str(Path(__file__).with_name("manifest_example.py")))["example"]
SIGNATURE = Signature.from_json(example()["signature"])
BATCH = SIGNATURE.sizes()["batch"]


def engine(name: str, sibling: str | None = None, **changes: Any) -> dict[str, Any]:
    made = {**example()["engines"][0], "name": name, "target": "trt", "precision": "fp16", "sibling": sibling}
    return {**made, **changes}


def benchmark(batch: int = BATCH, **ratios: tuple[float, float, float]) -> Any:
    """Timings at one batch; a name stands with its speed against the engine "dense" (ratio, low, high)."""
    result = example()["benchmark"]
    timing = result["timings"][0]
    result["timings"] = [{**timing, "candidate": "dense", "sizes": {"batch": batch}, "batch": batch, "p50_ms": 1.0}]
    for name, (ratio, low, high) in ratios.items():
        against = {"against": "dense", "ratio": ratio, "low": low, "high": high}
        one = {"candidate": name, "p50_ms": 1 / ratio, "against_sibling": against}
        result["timings"].append({**result["timings"][0], **one})
    return result


def settled(engines: list[Any], measured: Any) -> dict[str, Any]:
    drop(engines, measured, SIGNATURE)
    return verdict(engines, measured, SIGNATURE)


def wrong() -> dict[str, Any]:
    validation = example()["engines"][0]["validation"]
    output = {**validation["outputs"][0], "passed": False, "failures": ["relative_l2 is 0.2, 0.01 is allowed"]}
    return {**validation, "passed": False, "outputs": [output]}


@pytest.mark.parametrize(
    ("ratio", "dropped"), [((1.3, 1.2, 1.4), False), ((1.05, 1.02, 1.1), True), ((0.9, 0.8, 1.0), True)]
)
def test_an_engine_stays_where_the_whole_interval_is_above_its_siblings_speed(ratio, dropped) -> None:
    engines = [engine("dense"), engine("sparse", "dense")]
    found = settled(engines, benchmark(sparse=ratio))
    assert bool(engines[1]["dropped"]) is dropped
    assert found["best"] == ("dense" if dropped else "sparse")
    assert found["passed"] is True
    assert found["judged"] == (1 if dropped else 2)
    assert not engines[0]["dropped"]


def test_a_dropped_engine_is_told_with_its_numbers() -> None:
    found = settled([engine("dense"), engine("sparse", "dense")], benchmark(sparse=(1.004, 0.99, 1.01)))
    assert found["notes"][0] == (
        "sparse is dropped: it is not faster than dense: 1.00 times its speed, 95 % interval 0.99 to 1.01, "
        "which has to lie above 1.02"
    )


def test_a_wrong_engine_is_dropped_however_fast_and_the_verdict_is_that_of_the_others() -> None:
    engines = [engine("dense"), engine("sparse", "dense", validation=wrong())]
    found = settled(engines, benchmark(sparse=(2.0, 1.9, 2.1)))
    assert (found["passed"], found["best"]) == (True, "dense")
    assert found["reasons"] == []
    assert found["notes"][0] == (
        "sparse is dropped: its results are not close enough to the reference: "
        "output logits: relative_l2 is 0.2, 0.01 is allowed"
    )


@pytest.mark.parametrize(("problem", "told"), [("", "0.02"), ("no class scores", "no class scores")])
def test_a_budget_that_does_not_hold_is_named(problem: str, told: str) -> None:
    spent = {"text": "metric=0.003", "value": 0.02, "holds": False, "problem": problem}
    engines = [engine("dense"), engine("sparse", "dense", validation={**wrong(), "budget": spent})]
    settled(engines, None)
    assert engines[1]["dropped"].endswith(f"reference: budget metric=0.003, {told}")


def test_a_wrong_sibling_still_fails_the_verdict() -> None:
    engines = [engine("dense", validation=wrong()), engine("sparse", "dense")]
    found = settled(engines, benchmark(sparse=(1.3, 1.2, 1.4)))
    assert found["passed"] is False
    assert found["reasons"] == ["dense failed its validation"]


@pytest.mark.parametrize("measured", [None, benchmark(), benchmark(batch=BATCH + 1, sparse=(0.5, 0.4, 0.6))])
def test_what_was_not_measured_stays_and_is_told(measured: Any) -> None:
    engines = [engine("dense"), engine("sparse", "dense", status="built", validation=None)]
    found = settled(engines, measured)
    assert engines[1]["dropped"] == ""
    assert found["notes"][0] == "sparse was not measured against dense, which it has to be faster than"


def test_nothing_is_told_of_an_engine_that_was_refused() -> None:
    engines = [engine("dense", precision="fp32"), engine("sparse", "dense", status="unavailable", validation=None)]
    assert settled(engines, benchmark())["notes"] == []


def test_a_sibling_does_not_stand_for_full_precision() -> None:
    """Of two engines in fp32 the one without an optional step is what lower precisions are compared with."""
    engines = [
        engine("dense", precision="fp32"),
        engine("sparse", "dense", precision="fp32"),
        engine("half"),
    ]
    measured = benchmark(sparse=(1.5, 1.4, 1.6), half=(0.5, 0.4, 0.6))
    assert settled(engines, measured)["notes"] == [f"half is slower than dense: 2.00 times its time at batch {BATCH}"]


def test_alignment_changes_no_result() -> None:
    assert is_lossy(engine("dense-sparse", "dense"))
    assert is_lossy(engine("dense-sparse-attention", "dense"))
    assert not is_lossy(engine("dense-aligned", "dense"))
    assert not is_lossy(engine("dense"))


@pytest.mark.parametrize(
    ("name", "precision", "cache", "expected"),
    [
        ("dense", "fp32", "float32", "fp32"),
        ("dense", "fp32", "int8", "int8-weights"),
        ("dense", "fp16", "int8", "int8-weights"),
        ("dense", "int8", "int8", "int8"),
        ("dense-sparse", "fp32", "int8", "int8"),
    ],
)
def test_the_bounds_of_an_engine_are_those_of_what_is_coarsest_in_it(name, precision, cache, expected) -> None:
    specs = [TensorSpec(name, cache, (1, 2, 8, 4)) for name in ("key", "key_out")]
    signature = Signature((specs[0],), (specs[1],), states={"key": "key_out"})
    assert judged_as(EngineInfo(name, "trt", precision, "model.onnx", signature)) == expected
