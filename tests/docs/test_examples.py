"""The pass and the target in docs/examples do what their pages say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
from onnx.reference import ReferenceEvaluator

import enginesmith
from enginesmith.compiler import extensions
from enginesmith.compiler.graph import Graph
from enginesmith.compiler.signature import Signature
from enginesmith.errors import EngineMismatchError
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PASS = f"{EXAMPLES}/multiply.py:Multiply"
TARGET = f"{EXAMPLES}/evaluator.py:Evaluator"


def run_pass(text: str, divisor: str, kind: str = "float"):
    source = f"""<ir_version: 8, opset_import: ["": 17]>
        g ({kind}[2] x, {kind}[2] z) => ({kind}[2] y) <{kind}[2] c = {{{divisor}}}> {{ [divide] y = Div(x, c) }}"""
    graph = Graph.from_proto(onnx.parser.parse_model(source))
    before = graph.to_proto()
    result = parse_pass(text)(graph, Context(Signature(())))
    inputs = {"x": np.array([3, -7], "float32" if kind == "float" else "int64"), "z": np.zeros(2, "float32")}
    with np.errstate(divide="ignore"):
        outputs = [ReferenceEvaluator(proto).run(None, inputs)[0] for proto in (before, graph.to_proto())]
    return result, dict(graph.operators()), outputs


def test_a_division_becomes_a_multiplication_and_no_result_changes():
    result, operators, (before, after) = run_pass(PASS, "4, -0.5")
    assert result.changes == {"divisions replaced": 1}
    assert operators == {"Constant": 1, "Mul": 1}
    assert before.tobytes() == after.tobytes()


def test_a_rounded_reciprocal_is_for_those_who_ask():
    result, operators, _ = run_pass(PASS, "3, 4")
    assert operators == {"Div": 1}
    assert [(r.node, r.reason) for r in result.refusals] == [
        ("divide", "the reciprocal would be rounded; exact=false allows that")
    ]
    result, operators, (before, after) = run_pass(f"{PASS}:exact=false", "3, 4")
    assert operators == {"Constant": 1, "Mul": 1}
    np.testing.assert_allclose(before, after, rtol=1e-6)


@pytest.mark.parametrize(
    ("divisor", "kind", "reason"),
    [("0, 1", "float", "the divisor holds zero"), ("2, 2", "int64", "the divisor is of type int64")],
)
def test_what_has_no_reciprocal_is_refused(divisor, kind, reason):
    result, operators, _ = run_pass(PASS, divisor, kind)
    assert (operators, [refusal.reason for refusal in result.refusals]) == ({"Div": 1}, [reason])


def test_a_divisor_that_is_computed_or_given_is_refused():
    for divisor in ("z", "s"):
        source = f"""<ir_version: 8, opset_import: ["": 17]>
            g (float[2] x, float[2] z) => (float[2] y) {{ s = Abs(z)  y = Div(x, {divisor}) }}"""
        graph = Graph.from_proto(onnx.parser.parse_model(source))
        result = parse_pass(PASS)(graph, Context(Signature(())))
        assert [refusal.reason for refusal in result.refusals] == ["the divisor is no constant"]


@pytest.mark.slow
def test_a_bundle_of_both_is_judged_measured_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    bundle = enginesmith.compile(
        f"{EXAMPLES}/model.py:scaled",
        tmp_path / "out",
        inputs=["image:2x1x8x8"],
        precisions=["fp32"],
        targets=[TARGET, "onnxruntime-cpu"],
        passes=[f"{PASS}:exact=false"],
        baselines=(),
        rounds=6,
        slice_s=0.01,
    )
    assert bundle.passed
    assert [engine["name"] for engine in bundle.manifest["engines"]] == ["evaluator-fp32", "onnxruntime-cpu-fp32"]
    assert [record["changes"] for record in bundle.manifest["passes"]] == [{"divisions replaced": 2}]
    assert {timing["candidate"] for timing in bundle.manifest["benchmark"]["timings"]} == {
        "evaluator-fp32",
        "onnxruntime-cpu-fp32",
    }
    monkeypatch.setattr(extensions, "_named", {})  # as in another process
    with pytest.raises(EngineMismatchError, match=r"unknown target 'evaluator'\n.*name the file of your own target"):
        enginesmith.load(bundle.path, "evaluator-fp32")
    image = np.ones((2, 1, 8, 8), np.float32)
    with (
        enginesmith.load(bundle.path) as ours,
        enginesmith.load(bundle.path, "evaluator-fp32", targets=[TARGET]) as own,
    ):
        assert ours.target == "onnxruntime-cpu"
        np.testing.assert_allclose(ours(image=image), own(image=image), rtol=1e-4)
    command = [sys.executable, "-m", "enginesmith", "validate", bundle.path, "--engine", "evaluator-fp32", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), cwd=tmp_path, check=True)
    assert [validation["passed"] for validation in json.loads(run.stdout)] == [True]
