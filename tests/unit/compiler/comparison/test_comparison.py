"""Whole comparisons of engines that are right, wrong, slow or of another model."""

from __future__ import annotations

import hashlib
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

import enginesmith
from enginesmith.compiler.comparison.rules import Rules
from enginesmith.errors import EngineError, UnknownNameError, UsageError

small = runpy.run_path(str(Path(__file__).parents[3] / "small_bundles.py"))
METRIC = "def accuracy(outputs, inputs):\n    return outputs['left'].argmax(axis=1) == inputs['label']\n"
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a bundle of one engine by its change."""

    def make(name: str, change: str = "", **options: Any) -> Path:
        return Path(small["write_bundle"](tmp_path / name, {"engine": change}, **options))

    return make


def compare(a: object, b: object, **options: Any) -> Any:
    return enginesmith.compare(str(a), str(b), **{"benchmark": False, **options})


def states(found: Any, kind: str) -> dict[str, tuple[str, str]]:
    return {check["name"]: (check["verdict"], check["state"]) for check in found["checks"] if check["kind"] == kind}


def test_the_same_engine_passes(make: Make) -> None:
    found = compare(make("a"), make("b"))
    assert found["verdict"]["passed"]
    assert found["verdict"]["text"] == "speed was not measured; equal results"
    assert states(found, "accuracy") == {"left": ("within bounds", "passed"), "right": ("within bounds", "passed")}
    assert states(found, "results") == {"left": ("equal", "passed"), "right": ("equal", "passed")}
    assert found["same_model"] is True
    assert found["benchmark"] is None
    assert found["notes"] == []
    assert found["results"]["samples"] == 3
    assert json.loads(json.dumps(found)) == found | {"rules": found["rules"] | {"fail_on": list(Rules().fail_on)}}


@pytest.mark.parametrize("change", ["zeros", "nan", "swapped", "flipped", "scaled"])
def test_a_wrong_b_regressed(make: Make, change: str) -> None:
    found = compare(make("a"), make("b", change))
    assert not found["verdict"]["passed"]
    assert states(found, "accuracy")["left"] == ("worse", "failed")
    assert states(found, "results")["left"] == ("different", "information")
    assert found["verdict"]["text"] == "speed was not measured; different results, beyond its bounds"
    assert found["verdict"]["reasons"][0].startswith("accuracy, left: worse: relative L2 ")


def test_a_wrong_a_is_told_and_is_no_regression(make: Make) -> None:
    found = compare(make("a", "scaled"), make("b"))
    assert found["verdict"]["passed"]
    assert "A itself is not within its bounds" in found["notes"]
    assert states(found, "results")["left"] == ("different", "information")


def test_another_model_is_judged_on_its_own_reference(make: Make) -> None:
    found = compare(make("a"), make("b", w=small["W"] * 3, fingerprint="two"))
    assert found["verdict"]["passed"]
    assert found["verdict"]["results"] == "different"
    assert found["same_model"] is False
    assert any(note.startswith("A and B were made from different models") for note in found["notes"])
    strict = compare(found["a"]["path"], found["b"]["path"], rules=Rules(fail_on=("results",)))
    assert not strict["verdict"]["passed"]


def test_bounds_of_the_user_take_the_place_of_those_of_the_bundles(make: Make) -> None:
    loose = {"fp32": {"relative_l2": 0.5, "max_abs": 0.5}}
    assert compare(make("a"), make("b", "scaled"), tolerances=loose)["verdict"]["passed"]


def test_the_metric_of_b_is_compared_row_by_row(make: Make, tmp_path: Path) -> None:
    (tmp_path / "metric.py").write_text(METRIC)
    recipe = {"metric": f"{tmp_path}/metric.py:accuracy"}
    a, b = make("a", recipe=recipe, labels=True), make("b", "flipped", recipe=recipe, labels=True)
    loose = {"fp32": {"relative_l2": 2.0, "max_abs": 2.0, "cosine": 0.0, "top1": 0.0}}
    found = compare(a, b, tolerances=loose)
    assert states(found, "accuracy")["left"] == ("within bounds", "passed")
    assert found["results"]["metric"]["a"] == 1.0
    assert found["results"]["metric"]["b"] < 1.0
    assert found["results"]["metric"]["rows"] == 12
    same = compare(a, a)["results"]["metric"]
    assert (same["change"], same["low"], same["high"]) == (0.0, 0.0, 0.0)


def test_a_metric_that_is_not_here_any_more_is_left_out_with_a_note(make: Make) -> None:
    recipe = {"metric": "/gone/metric.py:accuracy", "budget": "metric=0.01"}
    found = compare(make("a"), make("b", recipe=recipe))
    assert found["verdict"]["passed"]
    assert "B was compiled with the metric '/gone/metric.py:accuracy', which is not here" in found["notes"]
    assert "the budget metric=0.01 of B could not be judged without it" in found["notes"]
    assert found["results"]["metric"] is None


def test_perplexity_needs_no_file(make: Make) -> None:
    recipe = {"metric": "perplexity", "budget": "metric=0.01"}
    with pytest.raises(UsageError, match="metric perplexity is of a language model"):  # and not left out with a note
        compare(make("a"), make("b", recipe=recipe))


def test_a_metric_that_is_given_and_not_there_is_an_error(make: Make) -> None:
    with pytest.raises(UsageError, match=r"absent\.py"):
        compare(make("a"), make("b"), metric="absent.py:accuracy")


def test_without_any_record_a_is_what_is_right(tmp_path: Path) -> None:
    right = small["write_engine"](tmp_path / "right")
    found = compare(right, small["write_engine"](tmp_path / "wrong", "scaled"))
    assert not found["verdict"]["passed"]
    assert states(found, "accuracy")["left beside A's"] == ("worse", "failed")
    assert states(found, "results") == {}
    assert "inputs were random: give --data for a verdict on real ones" in found["notes"]
    assert (found["same_model"], found["a"]["created"]) == (None, "")
    assert compare(right, right)["verdict"]["passed"]


def test_one_that_has_no_record_is_judged_on_the_others(make: Make, tmp_path: Path) -> None:
    found = compare(make("a"), small["write_engine"](tmp_path / "wrong", "scaled"))
    assert states(found, "accuracy")["left"] == ("worse", "failed")
    assert any(note.startswith("B has no record of a reference: it was judged on that of ") for note in found["notes"])
    assert found["results"]["own_record"] == {"a": True, "b": False}
    assert compare(small["write_engine"](tmp_path / "right"), tmp_path / "a")["verdict"]["passed"]


def test_data_are_what_both_are_run_on(make: Make, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones((8, 4), np.float32))
    found = compare(make("a"), make("b"), data=str(tmp_path / "x.npz"))
    assert (found["results"]["inputs"], found["results"]["samples"]) == ("x.npz", 2)


def test_growth_beyond_the_limit_regressed(make: Make) -> None:
    a, b = make("a"), make("b", "slow")
    assert compare(a, b)["verdict"]["passed"]
    found = compare(a, b, rules=Rules(max_growth=0.1))
    assert states(found, "growth") == {"size of the engine": ("larger", "failed")}
    assert not found["verdict"]["passed"]


def test_slower_and_faster_are_told_apart_at_each_size(make: Make) -> None:
    a, b = make("a"), make("b", "slow")
    quick = {"benchmark": True, "rounds": 6, "slice_s": 0.01, "sizes": [{"batch": 8}]}
    slower = compare(a, b, **quick)
    assert states(slower, "speed") == {"batch=8": ("slower", "failed")}
    assert slower["verdict"]["text"] == "B is slower; equal results"
    assert slower["benchmark"]["baseline"] == "A"
    faster = compare(b, a, **quick)
    assert states(faster, "speed") == {"batch=8": ("faster", "passed")}
    assert faster["verdict"]["passed"]


def broken(bundle: Path, rows: int) -> Path:
    """The bundle's engine fails on inputs of more rows than that."""
    path = bundle / "engines" / "engine" / "model.onnx"
    proto = onnx.load(path)
    limit = onnx.numpy_helper.from_array(np.arange(rows).reshape(rows, 1).astype(np.float32), "limit")
    proto.graph.initializer.append(limit)
    shape = onnx.helper.make_node("Shape", ["x"], ["shape"], end=1)
    last = onnx.helper.make_node("Sub", ["shape", "one"], ["last"])
    row = onnx.helper.make_node("Gather", ["limit", "last"], ["row"])
    nothing = onnx.helper.make_node("ReduceSum", ["row"], ["nothing"], keepdims=0)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "one"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0), "zero"))
    none = onnx.helper.make_node("Mul", ["nothing", "zero"], ["none"])
    scale = onnx.helper.make_node("Add", ["scale", "none"], ["scaled"])
    for node in reversed((shape, last, row, nothing, none, scale)):
        proto.graph.node.insert(0, node)
    next(node for node in proto.graph.node if node.op_type == "Mul" and "product" in node.input).input[1] = "scaled"
    onnx.save(proto, path)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["engines/engine/model.onnx"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


def test_b_that_fails_where_a_runs_regressed(make: Make) -> None:
    a, b = make("a"), broken(make("b"), 4)
    quick = {"benchmark": True, "rounds": 6, "slice_s": 0.01}
    found = compare(a, b, **quick)
    assert states(found, "speed")["batch=8"] == ("fails", "failed")
    assert states(found, "accuracy")["left"] == ("within bounds", "passed")
    assert found["verdict"]["text"].startswith("B fails where A runs")


def test_b_that_does_not_run_at_all_regressed_and_a_that_does_not_is_an_error(make: Make) -> None:
    a, b = make("a"), broken(make("b"), 2)
    found = compare(a, b)
    assert states(found, "results")["left"] == ("different", "information")
    assert states(found, "accuracy")["left"] == ("worse", "failed")
    assert "B failed on x (4, 4)" in found["results"]["between"][0]["failures"][0]
    with pytest.raises(EngineError, match=r"A \(.*\) does not run, so that nothing can be compared"):
        compare(b, a)


def test_a_field_that_a_comparison_does_not_take_gets_a_suggestion(make: Make) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown field of a comparison 'round'(?s:.)*did you mean 'rounds'"):
        compare(make("a"), make("b"), round=6)


def test_engines_that_cannot_be_compared_are_refused(make: Make) -> None:
    other = make("b", described=small["signature"](names=("x", "left", "right2")))
    with pytest.raises(UsageError, match="A and B have different outputs"):
        compare(make("a"), other)
