from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from enginesmith.compiler.budget import Budget
from enginesmith.compiler.calibration import Calibration
from enginesmith.compiler.graph import probe
from enginesmith.compiler.graph.emulation import emulate
from enginesmith.compiler.quantization.qdq import quantized_nodes
from enginesmith.errors import RecipeError
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Refusal
from enginesmith.passes.precision import Precision

GENERATOR = np.random.default_rng(0)


class Samples(list):
    description = "made up"
    random = False


def weight(rows: int, columns: int, scale: float = 1.0) -> str:
    numbers = GENERATOR.standard_normal(rows * columns) * scale / rows**0.5
    return "{" + ", ".join(f"{number:.5f}" for number in numbers) + "}"


CANCELS = f"""g (float[N,8] x) => (float[N,8] y)
    <float[8,8] u = {weight(8, 8)}, float[8,8] v = {weight(8, 8)}, float k = {{1000}}> {{
    [plain] a = MatMul(x, u)  [relu] b = Relu(a)
    [grow] c = Add(b, k)  [shrink] d = Sub(c, k)
    [head] y = MatMul(d, v) }}"""
"""Adds and takes away 1000: of what is between, float16 keeps one digit."""


def batches(count: int = 3) -> Samples:
    return Samples([{"x": GENERATOR.standard_normal((2, 8)).astype(np.float32)} for _ in range(count)])


@pytest.fixture
def run(read, context):
    """Runs the pass, with its base-class checks, within a budget."""

    def apply(rule, text, samples, budget=None):
        graph = read(text)
        calibration = None if samples is None or samples.random else Calibration(samples)
        given = dataclasses.replace(
            context(graph, samples), budget=budget and Budget.parse(budget), calibration=calibration
        )
        return graph, rule(graph, given)

    return apply


def dtypes(graph) -> dict[str, str]:
    return {node.name: node.outputs[0].dtype.name for node in graph.nodes() if node.op_type != "Cast"}


@pytest.mark.parametrize("to", ["fp16", "bf16"])
def test_what_harms_stays(read, run, to):
    samples = batches()
    graph, result = run(Precision(to=to), CANCELS, samples, "relative_l2=0.02")
    low = "FLOAT16" if to == "fp16" else "BFLOAT16"
    assert dtypes(graph) == {"plain": low, "relu": "FLOAT", "grow": "FLOAT", "shrink": "FLOAT", "head": low}
    assert result.changes["units kept"] == 1
    assert result.details["budget"] == "relative_l2=0.02"
    assert [entry["unit"] for entry in result.details["sensitivity"]] == ["plain", "head"]
    chosen = result.details["chosen"]
    assert chosen["holds"]
    assert chosen["value"] <= 0.02
    assert chosen["cost"] == 0
    assert chosen["names"] == ["grow", "relu", "shrink"]
    assert (result.details["curve"][0]["kept"], result.details["curve"][0]["holds"]) == (0, False)
    reason = next(refusal.reason for refusal in result.refusals if refusal.node == "grow")
    assert reason.startswith("kept for the budget relative_l2=0.02: alone, 'plain' makes an error of")
    for sample in samples:
        expected, found = probe.run(read(CANCELS), sample)["y"], probe.run(emulate(graph), sample)["y"]
        assert np.linalg.norm(found - expected) <= 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("to", ["fp16", "bf16"])
def test_casts_are_needed_ones(run, to):
    graph, _ = run(Precision(to=to), CANCELS, batches(), "relative_l2=0.02")
    casts = [node for node in graph.nodes() if node.op_type == "Cast"]
    assert len(casts) == 4
    assert not [node for node in casts if node.inputs[0].dtype == node.outputs[0].dtype]
    assert not [node for node in casts if node.inputs[0].producer() in casts]


def test_weights_that_nodes_compute_are_no_units_of_their_own(run):
    text = f"""g (float[N,8] x) => (float[N,8] y) <float[8,8] u = {weight(8, 8)}, float[8,8] v = {weight(8, 8)}> {{
        [turn] w = Transpose(u) [first] a = MatMul(x, w) [relu] b = Relu(a) [second] y = MatMul(b, v) }}"""
    graph, result = run(Precision(to="int8"), text, batches(), "relative_l2=0.000001")
    assert {node for entry in result.details["sensitivity"] for node in entry["nodes"]} == {"first", "relu", "second"}
    assert not any(node.op_type == "QuantizeLinear" for node in graph.nodes())


def test_progress_is_told(read, context):
    told = []
    graph, samples = read(CANCELS), batches()
    given = dataclasses.replace(
        context(graph, samples), budget=Budget.parse("relative_l2=0.02"), progress=lambda *told_: told.append(told_)
    )
    result = Precision(to="fp16")(graph, given)
    assert len(told) >= result.details["runs"] > 1
    assert all(0 < fraction < 1 for fraction, _ in told)
    assert told[0] == (1 / 3, "fp16, variant 1")


def test_everything_is_lowered_where_the_budget_allows(run):
    graph, result = run(Precision(), CANCELS, batches(), "relative_l2=9")
    assert set(dtypes(graph).values()) == {"FLOAT16"}
    assert result.changes["units kept"] == 0
    assert result.details["chosen"]["kept"] == 0


def test_nothing_is_lowered_where_the_budget_has_no_room(run):
    _, result = run(Precision(), CANCELS, batches(), "relative_l2=0")
    assert not result.modified
    assert result.details["chosen"]["cost"] == 1
    assert {refusal.node for refusal in result.refusals} == {"plain", "relu", "grow", "shrink", "head"}


def test_default_budget(run):
    _, result = run(Precision(), CANCELS, batches())
    assert result.details["budget"] == "relative_l2=0.0025"
    assert result.details["samples"] == result.details["checks"] == 3  # there are no more


def test_budget_on_agreement(run):
    _, result = run(Precision(to="bf16", samples=1), CANCELS, batches(6), "top1=1")
    assert result.details["chosen"]["value"] == 1
    assert (result.details["samples"], result.details["checks"]) == (1, 6)


def test_twice_the_same(run):
    samples = batches()
    assert len({str(run(Precision(), CANCELS, samples, "relative_l2=0.02")[1].details) for _ in range(2)}) == 1


def test_nodes_stay_by_choice(run):
    graph, result = run(Precision(keep=("head",)), CANCELS, batches(), "relative_l2=9")
    assert dtypes(graph)["head"] == "FLOAT"
    assert Refusal("kept by choice: 'head'", "head") in result.refusals
    assert [entry["unit"] for entry in result.details["sensitivity"]] == ["plain"]
    with pytest.raises(RecipeError, match="no node matches 'haed'"):
        run(Precision(keep=("haed",)), CANCELS, batches())


def test_data_is_needed(run):
    with pytest.raises(RecipeError, match="measures errors on data, and there is none"):
        run(Precision(), CANCELS, None)


def test_made_up_data_is_told(run):
    samples = batches()
    samples.random = True
    _, result = run(Precision(), CANCELS, samples)
    assert Refusal("errors were measured on made up") in result.refusals


def test_nothing_to_lower(run):
    _, result = run(Precision(), "g (int64[N,8] x) => (int64[N,8] y) { y = Neg(x) }", None)
    assert not result.modified


def test_options_that_cannot_be():
    with pytest.raises(RecipeError, match="samples, checks and units are at least 1"):
        parse_pass("precision:samples=0")
    with pytest.raises(RecipeError, match="no FP8 kernels"):
        parse_pass("precision:to=int8,dtype=fp8")


IDENTITY = "{" + ", ".join(map(str, np.eye(8, dtype=int).ravel())) + "}"
OUTLIER = f"""g (float[N,8] x) => (float[N,8] y)
    <float[8,8] u = {weight(8, 8)}, float[8,8] v = {weight(8, 8)}, float[8] k = {{5000, 1, 1, 1, 1, 1, 1, 1}},
     float[8] j = {{0.0002, 1, 1, 1, 1, 1, 1, 1}}, float[8,8] e = {IDENTITY}> {{
    [first] a = MatMul(x, u)  [grow] b = Mul(a, k)
    [outlier] c = MatMul(b, e)  [shrink] d = Mul(c, j)
    [last] y = MatMul(d, v) }}"""
"""One channel of what goes into the second product is 5000 times larger than the others."""


def test_int8(read, run):
    samples = batches(8)
    graph, result = run(Precision(to="int8", samples=8, smooth=0), OUTLIER, samples, "relative_l2=0.1")
    assert result.details["sensitivity"][0]["unit"] == "outlier"
    assert result.details["chosen"]["holds"]
    assert "outlier" in result.details["chosen"]["names"]
    quantized = {node.inputs[0].producer().op_type for node in graph.nodes() if node.op_type in ("MatMul", "Gemm")}
    assert quantized == {"DequantizeLinear", "Mul"}
    assert any(r.node == "outlier" and r.reason.startswith("kept for the budget") for r in result.refusals)
    for sample in samples:
        expected, found = probe.run(read(OUTLIER), sample)["y"], probe.run(graph, sample)["y"]
        assert np.linalg.norm(found - expected) <= 0.1 * np.linalg.norm(expected)


def test_int8_and_float16_in_series(read, run, context):
    samples = batches(8)
    graph, _ = run(Precision(to="int8", samples=8, smooth=0), OUTLIER, samples, "relative_l2=0.1")
    result = parse_pass("cast:to=fp16")(graph, context(graph, samples))
    assert result.modified
    assert quantized_nodes(graph)
    casts = [node for node in graph.nodes() if node.op_type == "Cast"]
    assert not [node for node in casts if node.inputs[0].producer() in casts]
    assert not [node for node in casts if node.inputs[0].const_value is not None]
    expected, found = probe.run(read(OUTLIER), samples[0])["y"], probe.run(emulate(graph), samples[0])["y"]
    assert np.linalg.norm(found - expected) <= 0.12 * np.linalg.norm(expected)


def test_a_metric_is_measured_where_its_labels_are(read, context):
    class Labelled(Samples):
        def labelled(self):
            return ({**sample, "label": np.int64(0)} for sample in self)

    seen = []
    budget = Budget("metric", 1.0, lambda outputs, inputs: seen.append("label" in inputs) or 1.0)
    graph, calibration = read(CANCELS), Calibration(batches())
    given = context(graph, Labelled(batches()))
    Precision()(graph, dataclasses.replace(given, calibration=calibration, budget=budget))
    assert set(seen) == {True}
