from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from enginesmith.compiler.capture import capture
from enginesmith.compiler.graph import Graph, probe
from enginesmith.compiler.pruning.latency import Stopwatch
from enginesmith.compiler.quantization.layers import as_layer, assign, constant
from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.errors import RecipeError, TargetUnavailableError, UnknownNameError
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context, PassResult
from enginesmith.passes.prune import Prune
from enginesmith.targets.base import Availability
from enginesmith.targets.onnxruntime_cpu import OnnxRuntimeCpu

CHAIN = """g (float[N,3,8,8] x) => (float[N,10] y)
    <float[16,3,3,3] w0, float[16] b0, float[32,16,3,3] w1, float[32] b1, float[32,10] v, float[10] c> {
    [stem] c0 = Conv<pads = [1,1,1,1]>(x, w0, b0)  r0 = Relu(c0)
    [wide] c1 = Conv<pads = [1,1,1,1], strides = [2,2]>(r0, w1, b1)  r1 = Relu(c1)
    p = GlobalAveragePool(r1)  f = Flatten(p)  [head] y = Gemm(f, v, c) }"""
RESIDUAL = """g (float[N,3,8,8] x) => (float[N,10] y)
    <float[16,3,3,3] w0, float[24,16,3,3] w1, float[16,24,3,3] w2, float[16] b2, float[16,10] v> {
    [stem] c0 = Conv<pads = [1,1,1,1]>(x, w0)  r0 = Relu(c0)  [inner] c1 = Conv<pads = [1,1,1,1]>(r0, w1)  r1 = Relu(c1)
    [outer] c2 = Conv<pads = [1,1,1,1]>(r1, w2, b2)  s = Add(c2, r0)  r2 = Relu(s)
    p = GlobalAveragePool(r2)  f = Flatten(p)  [head] y = MatMul(f, v) }"""
SEPARABLE = """g (float[N,3,8,8] x) => (float[N,8,6,6] y)
    <float[16,3,1,1] w0, float[16,1,3,3] w1, float[16] b1, float[32,16,1,1] w2, float[32,8,1,1] w3,
     float[8,32,3,3] w4> {
    [stem] c0 = Conv(x, w0)  r0 = Relu(c0)
    [depthwise] c1 = Conv<group = 16, pads = [1,1,1,1]>(r0, w1, b1)  r1 = Relu(c1)
    [point] c2 = Conv(r1, w2)  r2 = Relu(c2)  [grouped] c3 = Conv<group = 4>(r2, w3)  r3 = Relu(c3)
    [head] y = Conv(r3, w4) }"""
JOINED = """g (float[N,3,8,8] x) => (float[N,8,8,8] y) <float[16,3,1,1] w0, float[24,16,1,1] w1, float[8,40,1,1] w2> {
    [first] c0 = Conv(x, w0)  r0 = Relu(c0)  [second] c1 = Conv(r0, w1)  j = Concat<axis = 1>(r0, c1)  r1 = Relu(j)
    [head] y = Conv(r1, w2) }"""
MLP = """g (float[N,T,16] x) => (float[N,T,8] y)
    <float[16,32] w, float[32] b, float[32,24] v, float[24,8] u, float[8] d> {
    [first] h0 = MatMul(x, w)  h = Add(h0, b)  r = Sigmoid(h)  [second] i = MatMul(r, v)  s = Relu(i)
    [third] m = MatMul(s, u)  y = Add(m, d) }"""
FLAT = """g (float[N,16] x) => (float[N,8] y)
    <float[16,48] w, float[48] b, float[48,24] v, float[24] c, float[24,8] u> {
    [first] h = Gemm(x, w, b)  r = Relu(h)  [second] i = Gemm(r, v, c)  s = Relu(i)  [third] y = MatMul(s, u) }"""
ATTENTION = """g (float[N,6,32] x) => (float[N,6,8] y)
    <float[32,32] q, float[32] b, float[32,32] k, float[32,32] v, float[32,8] o, float[8] d> {
    [q] q0 = MatMul(x, q)  qb = Add(q0, b)  [k] k0 = MatMul(x, k)  [v] v0 = MatMul(x, v)
    s = Constant<value_ints = [0,6,4,8]>()  q1 = Reshape(qb, s)  k1 = Reshape(k0, s)  v1 = Reshape(v0, s)
    q2 = Transpose<perm = [0,2,1,3]>(q1)  k2 = Transpose<perm = [0,2,3,1]>(k1)  v2 = Transpose<perm = [0,2,1,3]>(v1)
    a = MatMul(q2, k2)  p = Softmax(a)  m = MatMul(p, v2)  m1 = Transpose<perm = [0,2,1,3]>(m)
    t = Constant<value_ints = [0,6,32]>()  m2 = Reshape(m1, t)  [o] z = MatMul(m2, o)  y = Add(z, d) }"""
SINGLE = """g (float[N,6,32] x) => (float[N,6,8] y) <float[32,96] w, float[32,8] o> {
    [qkv] h = MatMul(x, w)  q, k, v = Split<axis = 2>(h)  t = Transpose<perm = [0,2,1]>(k)  a = MatMul(q, t)
    p = Softmax(a)  m = MatMul(p, v)  [o] y = MatMul(m, o) }"""
LSTM = """g (float[5,N,8] x) => (float[5,N,4] y) <float[1,64,8] w, float[1,64,16] r, float[1,128] b, float[16,4] v> {
    [rnn] h = LSTM<hidden_size = 16>(x, w, r, b)  a = Constant<value_ints = [1]>()  q = Squeeze(h, a)
    [head] y = MatMul(q, v) }"""
NORMALIZED = """g (float[N,3,8,8] x) => (float[N,8,8,8] y)
    <float[16,3,3,3] w0, float[16] s0, float[16] h0, float[16] m0, float[16] v0 = {VAR}, float[16,16,1,1] w1,
     float[16] s1, float[16] h1, float[16] m1, float[16] v1 = {VAR}, float[8,16,1,1] w2> {
    [stem] c0 = Conv<pads = [1,1,1,1]>(x, w0)  n0 = BatchNormalization(c0, s0, h0, m0, v0)  r0 = Relu(n0)
    [mid] c1 = Conv(r0, w1)  n1 = BatchNormalization(c1, s1, h1, m1, v1)  r1 = Relu(n1)
    [head] y = Conv(r1, w2) }""".replace("VAR", ", ".join(["1.5"] * 16))
ALL = {
    "chain": CHAIN,
    "residual": RESIDUAL,
    "separable": SEPARABLE,
    "joined": JOINED,
    "mlp": MLP,
    "attention": ATTENTION,
    "one head": SINGLE,
    "lstm": LSTM,
    "normalized": NORMALIZED,
}


def relative_error(before: Graph, after: Graph, samples) -> float:
    lost = whole = 0.0
    for sample in samples:
        expected, found = probe.run(before, sample), probe.run(after, sample)
        for name, array in expected.items():
            assert found[name].shape == array.shape
            assert found[name].dtype == array.dtype
            lost, whole = lost + np.square(found[name] - array).sum(), whole + np.square(array).sum()
    return float(np.sqrt(lost / whole))


def pruned(graph: Graph, context: Context, **options: Any) -> tuple[PassResult, float]:
    """Prunes a graph, checks what it promised, and gives the result with the error on the calibration data."""
    before = graph.clone()
    result = Prune(**options)(graph, context)
    graph.verify()
    return result, relative_error(before, graph, context.calibration.samples)


def sizes(result: PassResult) -> dict[str, tuple[int, int]]:
    return {row["group"]: (row["before"], row["after"]) for row in result.details["prune"]}


def reasons(result: PassResult) -> dict[str, str]:
    return {refusal.node: refusal.reason for refusal in result.refusals}


def layer_of(graph: Graph, name: str):
    return as_layer(next(node for node in graph.nodes() if node.name == name))


def repeat(graph: Graph, name: str, half: int) -> None:
    """Makes the outputs of a layer behind the first `half` copies of these."""
    layer = layer_of(graph, name)
    weight = layer.load().copy()
    weight[half:] = weight[np.arange(len(weight) - half) % half]
    layer.store(weight)
    if len(layer.node.inputs) > 2:
        bias = constant(layer.node.inputs[2]).copy()
        bias[half:] = bias[np.arange(len(bias) - half) % half]
        assign(layer.node.inputs[2], bias)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("chain", {"stem": (16, 8), "wide": (32, 16)}),
        ("residual", {"stem": (16, 8), "inner": (24, 16)}),
        ("separable", {"stem": (16, 8), "point": (4, 2)}),
        ("joined", {"first": (16, 8), "second": (24, 16)}),
        ("mlp", {"first": (32, 16), "second": (24, 16)}),
        ("attention", {"q": (4, 2)}),
        ("one head", {"qkv": (32, 16)}),
        ("lstm", {"rnn": (16, 8)}),
        ("normalized", {"stem": (16, 8), "mid": (16, 8)}),
    ],
)
def test_half_of_everything_goes(fill, calibrated, model, expected):
    graph = fill(ALL[model])
    operators, weights = graph.operators(), graph.weight_bytes
    result, error = pruned(graph, calibrated(graph), ratio=0.5)
    assert {name.partition("#")[0]: size for name, size in sizes(result).items()} == expected
    assert result.changes["dimensions pruned"] == len(sizes(result))
    assert result.changes["positions removed"] == sum(before - after for before, after in sizes(result).values())
    assert error < 0.7
    assert result.details["error"] == pytest.approx(error, rel=0.1)
    assert graph.operators() - operators == {}
    assert result.details["weight_bytes"]["after"] == graph.weight_bytes < weights
    assert result.details["macs"]["after"] < 0.85 * result.details["macs"]["before"]


def test_weights_shrink_on_both_sides(fill, calibrated):
    graph = fill(SEPARABLE)
    pruned(graph, calibrated(graph), ratio=0.5)
    shapes = {name: layer_of(graph, name).load().shape for name in ("stem", "depthwise", "point", "grouped", "head")}
    assert shapes == {
        "stem": (8, 3, 1, 1),
        "depthwise": (8, 1, 3, 3),
        "point": (16, 8, 1, 1),
        "grouped": (16, 8, 1, 1),
        "head": (8, 16, 3, 3),
    }
    assert [n.attributes.get_int("group", 1) for n in graph.nodes() if n.op_type == "Conv"] == [1, 8, 1, 2, 1]


@pytest.mark.parametrize("model", ["residual", "separable", "attention", "lstm", "normalized"])
def test_a_fit_is_no_worse_than_none(fill, calibrated, model):
    graph = fill(ALL[model])
    context = calibrated(graph, batches=8)
    fitted, error = pruned(graph.clone(), context, ratio=0.5)
    plain, without = pruned(graph, context, ratio=0.5, refit=False)
    assert sizes(fitted) == sizes(plain)
    assert error < without
    assert plain.details["fits"] == []
    assert fitted.details["fits"]
    assert all(fit["after"] <= fit["before"] for fit in fitted.details["fits"])


@pytest.mark.parametrize(
    ("model", "name", "bound"),
    [("chain", "stem", 1e-4), ("residual", "inner", 1e-4), ("joined", "second", 1e-3), ("mlp", "second", 1e-3)],
)
def test_what_is_redundant_goes_without_a_trace(fill, calibrated, model, name, bound):
    graph = fill(ALL[model])
    size = len(layer_of(graph, name).load())
    repeat(graph, name, 8)
    result, error = pruned(graph, calibrated(graph, batches=8), ratio=0.001, ratios=(f"{name}:0.67",))
    assert sizes(result) == {name: (size, 8)}
    assert error < bound


def test_linear_combinations_go_without_a_trace(fill, calibrated):
    graph = fill(FLAT.replace("s = Relu(i)", "s = Identity(i)"))
    layer = layer_of(graph, "second")
    weight = layer.load().copy()
    weight[16:] = np.random.default_rng(3).standard_normal((8, 16)) @ weight[:16]
    layer.store(weight)
    assign(graph.model.graph.initializers["c"], np.zeros(24, np.float32))
    result, error = pruned(graph, calibrated(graph, batches=8), ratio=0.001, ratios=("second:0.34",))
    assert sizes(result) == {"second": (24, 16)}
    assert error < 1e-4


@pytest.mark.parametrize("model", ["chain", "residual", "separable", "joined", "mlp", "attention", "lstm"])
def test_multiply_adds_are_the_goal(fill, calibrated, model):
    share = 0.6
    graph = fill(ALL[model])
    result, _ = pruned(graph, calibrated(graph), macs=share, multiple=2)
    told = result.details["macs"]
    assert told["after"] <= share * told["before"] * (1 + 1e-9)
    assert not any("was asked for" in refusal.reason for refusal in result.refusals)
    smallest_step = max(row["macs"] / max(1, (row["before"] - row["after"]) // 2) for row in result.details["prune"])
    assert told["after"] / told["before"] > share - 2 * smallest_step


def test_a_goal_that_cannot_be_reached_is_told_first(fill, calibrated):
    graph = fill(CHAIN)
    result, _ = pruned(graph, calibrated(graph), macs=0.01)
    assert sizes(result) == {"stem": (16, 8), "wide": (32, 8)}
    assert result.refusals[0].reason == (
        "macs falls to 0.227 of what it was, 0.01 was asked for: what is left cannot shrink that far"
    )


def test_a_global_ratio_takes_from_where_it_costs_least(fill, calibrated):
    graph = fill(FLAT)
    repeat(graph, "first", 16)
    result, error = pruned(graph, calibrated(graph, batches=8), ratio=0.44, scope="global")
    assert sizes(result) == {"first": (48, 16)}
    assert error < 1e-4


def test_single_ratios_and_dimensions_that_are_kept(fill, calibrated):
    graph = fill(FLAT)
    result, _ = pruned(graph.clone(), calibrated(graph), ratio=0.5, ratios=("sec*:0.7", "*:0.25"))
    assert sizes(result) == {"first": (48, 40), "second": (24, 8)}
    result, _ = pruned(graph.clone(), calibrated(graph), ratio=0.5, keep=("first",))
    assert sizes(result) == {"second": (24, 16)}
    assert reasons(result)["first"] == "kept by choice"


@pytest.mark.parametrize(("option", "pattern"), [("ratios", "blok*:0.1"), ("keep", "blok*")])
def test_globs_that_match_nothing(fill, calibrated, option, pattern):
    graph = fill(FLAT)
    with pytest.raises(RecipeError, match="no dimension that can be pruned matches 'blok\\*'"):
        Prune(ratio=0.5, **{option: (pattern,)})(graph, calibrated(graph))


@pytest.mark.parametrize("importance", ["l1", "l2", "activation", "hessian", "obs"])
def test_dead_neurons_go_first(fill, calibrated, importance):
    graph = fill(FLAT)
    layer = layer_of(graph, "first")
    weight = layer.load().copy()
    weight[8:40] = 0
    layer.store(weight)
    assign(graph.model.graph.initializers["b"], np.zeros(48, np.float32))
    result, error = pruned(graph, calibrated(graph), ratio=0.001, ratios=("first:0.67",), importance=importance)
    assert sizes(result) == {"first": (48, 16)}
    assert error < 1e-5
    assert result.details["importance"] == importance


@given(st.integers(9, 40), st.integers(9, 40), st.integers(1, 12), st.floats(0.05, 0.95))
@settings(max_examples=8, deadline=None)
def test_any_sizes(fill, calibrated, first, second, multiple, ratio):
    text = FLAT.replace("48", str(first)).replace("24", str(second))
    graph = fill(text)
    context = calibrated(graph)
    result = Prune(ratio=ratio, multiple=multiple)(graph, context)
    for row in result.details.get("prune", ()):
        assert row["after"] % multiple == 0
        assert 0 < row["after"] < row["before"]


def test_twice_changes_nothing_even_after_it_was_saved(fill, calibrated, tmp_path):
    graph = fill(FLAT)
    context = calibrated(graph)
    Prune(ratio=0.3)(graph, context)
    graph.save(tmp_path / "pruned.onnx")
    for again in (graph, graph.clone(), Graph.load(tmp_path / "pruned.onnx")):
        result = Prune(ratio=0.5)(again, context)
        assert not result.modified
        assert [refusal.reason for refusal in result.refusals] == ["the graph was pruned already, by prune:ratio=0.3"]


def test_what_is_left_alone_stays_as_it_is(read, fill, calibrated):
    graph = read("g (float[N,16] x) => (float[N,16] y) { y = Relu(x) }")
    for options in ({"ratio": 0.5}, {"macs": 0.5}, {"latency": 0.5}):
        result = Prune(**options)(graph, calibrated(graph))
        assert not result.modified
        assert [refusal.reason for refusal in result.refusals] == ["it has no dimension that can shrink"]
    graph = fill("g (float[N,16] x) => (float[N,32] y) <float[16,32] w> { [only] y = MatMul(x, w) }")
    result = Prune(ratio=0.5)(graph, calibrated(graph))
    assert reasons(result) == {
        "": "it has no dimension that can shrink",
        "only": "it is an output of the model (y)",
    }


def test_a_ratio_too_small_for_the_multiple_says_so(fill, calibrated):
    graph = fill(FLAT)
    result = Prune(ratio=0.05)(graph, calibrated(graph))
    assert not result.modified
    assert reasons(result)["first"] == "of the multiples of 8, none is nearer to what 0.05 leaves"


def test_weights_that_are_shared_between_dimensions_hold_them(fill, calibrated):
    graph = fill("""g (float[N,16] x) => (float[N,8] y) <float[16,16] w, float[16,8] u> {
        [a] h = MatMul(x, w)  r = Relu(h)  [b] i = MatMul(r, w)  s = Relu(i)  [c] y = MatMul(s, u) }""")
    result = Prune(ratio=0.5)(graph, calibrated(graph))
    assert not result.modified
    assert reasons(result)["a"] == "it is an input of the model (x)"


def test_dynamic_axes_stay(fill, calibrated):
    graph = fill(MLP)
    pruned(graph, calibrated(graph), ratio=0.5)
    assert [str(axis) for axis in graph.model.graph.outputs[0].shape] == ["N", "T", "8"]
    for rows, length in ((1, 1), (3, 7)):
        found = probe.run(graph, {"x": np.zeros((rows, length, 16), np.float32)})["y"]
        assert found.shape == (rows, length, 8)


def test_without_data_weights_alone_decide_and_nothing_is_fitted(fill, context):
    graph = fill(FLAT)
    result = Prune(ratio=0.5)(graph, context(graph))
    assert result.modified
    assert result.details["importance"] == "l2"
    assert result.details["fits"] == []
    assert result.details["error"] is None
    assert "sensitivity" not in result.details
    assert result.refusals[0].reason == "nothing is fitted to what was there before: there is no calibration data"


@pytest.mark.parametrize("options", [{"refit": True}, {"importance": "obs"}, {"importance": "hessian"}])
def test_data_that_is_asked_for_and_not_there(fill, context, options):
    graph = fill(FLAT)
    with pytest.raises(RecipeError, match="prune needs calibration data, to see what its layers read"):
        Prune(ratio=0.5, **options)(graph, context(graph))


def test_each_dimension_is_measured_alone(fill, calibrated):
    graph = fill(FLAT)
    repeat(graph, "first", 32)
    result, _ = pruned(graph, calibrated(graph, batches=8), macs=0.6)
    rows = {row["group"]: row for row in result.details["sensitivity"]}
    assert (rows["first"]["size"], rows["first"]["tried"]) == (48, 32)
    assert (rows["second"]["size"], rows["second"]["tried"]) == (24, 16)
    assert rows["first"]["error"] < 1e-3 < rows["second"]["error"]
    assert [row["group"] for row in result.details["sensitivity"]] == ["second", "first"]
    result = Prune(ratio=0.5, sensitivity=False)(fill(FLAT), calibrated(graph))
    assert "sensitivity" not in result.details


def test_batch_statistics_stay_where_new_ones_bring_nothing(fill, calibrated, monkeypatch):
    graph = fill(NORMALIZED)
    context = calibrated(graph)
    result, error = pruned(graph.clone(), context, ratio=0.5)
    told = "batch statistics stay: outputs are no closer with new ones"
    assert ("batch statistics taken anew" in result.changes) != any(r.reason == told for r in result.refusals)

    def worse(whole, after, kept, samples):
        value = after.model.graph.initializers["m1"]
        assign(value, value.const_value.numpy() + 3)
        return {"batch statistics taken anew": 1}

    monkeypatch.setattr("enginesmith.compiler.pruning.run.reestimate", worse)
    result, same = pruned(graph, context, ratio=0.5)
    assert same <= error * 1.5
    assert "batch statistics taken anew" not in result.changes
    assert told in [refusal.reason for refusal in result.refusals]


@pytest.fixture
def clock(monkeypatch):
    """Time is what the weights take, and one for each graph."""

    def milliseconds(self, *graphs):
        return [1e-3 * graph.weight_bytes for graph in graphs]

    monkeypatch.setattr(Stopwatch, "milliseconds", milliseconds)


def test_latency_is_the_goal(fill, calibrated, clock):
    graph = fill(FLAT)
    result, _ = pruned(graph, calibrated(graph), latency=0.6)
    told = result.details["latency"]
    last = told["tries"][-1]
    assert (told["target"], told["goal"]) == ("onnxruntime-cpu", 0.6)
    assert last["after_ms"] <= 0.6 * last["before_ms"]
    assert result.details["weight_bytes"]["after"] <= 0.6 * result.details["weight_bytes"]["before"]


def test_latency_that_cannot_be_reached(fill, calibrated, clock):
    graph = fill(FLAT)
    result, _ = pruned(graph, calibrated(graph), latency=0.01)
    assert "latency falls to" in result.refusals[0].reason
    assert sizes(result) == {"first": (48, 8), "second": (24, 8)}


def test_a_clock_that_sees_no_difference_leaves_it_to_multiply_adds(fill, calibrated, monkeypatch):
    monkeypatch.setattr(Stopwatch, "milliseconds", lambda self, *graphs: [1.0 for _ in graphs])
    graph = fill(FLAT)
    result, _ = pruned(graph, calibrated(graph), latency=0.7)
    assert result.details["macs"]["after"] <= 0.7 * result.details["macs"]["before"]
    assert result.refusals[0].reason.startswith("latency falls to 1 of what it was, 0.7 was asked for")


def test_latency_on_a_target_that_does_not_run_here(fill, calibrated, monkeypatch):
    monkeypatch.setattr(OnnxRuntimeCpu, "availability", lambda self: Availability(False, False, "it is not there"))
    graph = fill(FLAT)
    with pytest.raises(
        TargetUnavailableError, match="cannot be measured on onnxruntime-cpu: it is not there"
    ) as caught:
        Prune(latency=0.7)(graph, calibrated(graph))
    assert caught.value.hint == "choose ratio or macs as the goal"


@pytest.mark.parametrize("model", ["residual", "attention"])
@pytest.mark.parametrize("then", ["quantize-static", "align:multiple=16", "sparsify", "quantize-dynamic"])
def test_other_passes_after_it(fill, calibrated, model, then):
    graph = fill(ALL[model])
    context = calibrated(graph)
    before = graph.clone()
    Prune(ratio=0.5)(graph, context)
    middle = graph.clone()
    parse_pass(then)(graph, context)
    graph.verify()
    error = relative_error(before, middle, context.calibration.samples)
    assert relative_error(before, graph, context.calibration.samples) < error + 0.4


def test_after_align_what_was_grown_goes_first(fill, calibrated):
    graph = fill(FLAT.replace("48", "46"))
    context = calibrated(graph)
    parse_pass("align")(graph, context)
    result, error = pruned(graph, context, ratio=0.001, ratios=("first:0.17",))
    assert sizes(result) == {"first": (48, 40)}
    assert error < 0.1


@pytest.mark.parametrize("options", ["", ":keep=first", ":keep=second", ":keep=third"])
def test_a_model_that_is_quantized_already_is_never_broken(fill, calibrated, options):
    graph = fill(FLAT)
    context = calibrated(graph)
    parse_pass(f"quantize-static{options}")(graph, context)
    before = graph.clone()
    result = Prune(ratio=0.3)(graph, context)
    graph.verify()
    assert np.isfinite(relative_error(before, graph, context.calibration.samples))
    assert result.modified or result.refusals
    for row in result.details.get("prune", ()):
        assert row["after"] < row["before"]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(16)
        self.inner = torch.nn.Conv2d(16, 16, 3, padding=1)
        self.mixes = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))
        self.last = torch.nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.stem(x)))
        y = y + torch.relu(self.inner(y))
        tokens = y.flatten(2).transpose(1, 2)
        q, k, v = (mix(tokens).unflatten(-1, (4, 4)).transpose(1, 2) for mix in self.mixes[:3])
        mixed = torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v
        return self.last(torch.relu(self.mixes[3](mixed.transpose(1, 2).flatten(2))).mean(1))


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_graphs_captured_from_torch(exporter, calibrated, tmp_path):
    torch.manual_seed(0)
    model = load_model(Net().eval(), inputs=parse_inputs(["x:2x3x4x4"], ["x:0=1..2..8"]))
    found = capture(
        model, exporter=exporter, opset_range=(17, 18), samples=None, seed=0, directory=tmp_path, log=lambda line: None
    )
    graph = found.graph
    for text in ("simplify", "dedupe"):
        parse_pass(text)(graph, calibrated(graph))
    context = calibrated(graph, size=8)
    result, error = pruned(graph, context, macs=0.75, multiple=4)
    assert result.details["macs"]["after"] <= 0.75 * result.details["macs"]["before"]
    assert error < 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune:ratio=0.3,macs=0.5", "one of ratio, macs and latency is the goal, found ratio"),
        ("prune:ratio=0", "ratio is a share between 0 and 1, found 0"),
        ("prune:ratio=1", "ratio is a share between 0 and 1, found 1"),
        ("prune:macs=-1", "macs is a share between 0 and 1, found -1"),
        ("prune:latency=1.5", "latency is a share between 0 and 1, found 1.5"),
        ("prune:ratio=nan", "ratio is a share between 0 and 1, found nan"),
        ("prune:ratio=abc", "option 'ratio' of 'prune' has the wrong type"),
        ("prune:ratio=30%", "option 'ratio' of 'prune' has the wrong type"),
        ("prune:ratio=0.3,multiple=0", "multiple is at least 1, found 0"),
        ("prune:ratio=0.3,ratios=head", "'head' is no glob:ratio"),
        ("prune:macs=0.3,ratios=head:0.1", "ratios are for ratio with scope=local"),
        ("prune:ratio=0.3,scope=global,ratios=head:0.1", "ratios are for ratio with scope=local"),
        ("prune:ratio=0.3,importance=magic", "option 'importance' of 'prune' has an unknown value"),
    ],
)
def test_options_that_cannot_be(text, message):
    with pytest.raises(RecipeError, match=message):
        parse_pass(text)


def test_an_option_that_is_none():
    with pytest.raises(UnknownNameError, match="unknown option of 'prune' 'keeps'"):
        parse_pass("prune:ratio=0.3,keeps=head")


@pytest.mark.parametrize(
    "text",
    [
        "prune:ratio=0.3",
        "prune:macs=0.7,importance=hessian,keep=a+b*",
        "prune:ratio=0.3,ratios=a:0.1+b:0.0,refit=false",
    ],
)
def test_options_as_text(text):
    assert str(parse_pass(text)) == text


@pytest.mark.parametrize(
    ("options", "calibrates"),
    [({}, False), ({"refit": True}, True), ({"refit": False}, False), ({"importance": "obs"}, True)],
)
def test_what_needs_data(options, calibrates):
    assert dataclasses.replace(Prune(ratio=0.5), **options).calibrates == calibrates
