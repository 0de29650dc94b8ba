from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enginesmith.compiler.graph import probe
from enginesmith.compiler.quantization import hessians as hessians_module
from enginesmith.compiler.quantization.hessians import hessians, positions
from enginesmith.compiler.quantization.layers import assign, constant, layers
from enginesmith.compiler.quantization.parameters import Parameters, weight_parameters
from enginesmith.compiler.quantization.plan import Use, Weight
from enginesmith.compiler.quantization.qdq import Quantized
from enginesmith.compiler.quantization.rounding import DAMPING, gptq, round_weights

BOUNDS = (-127, 127)


class Samples(list):
    description = "made up"
    random = False


def correlated(rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((rows, inputs)) @ generator.standard_normal((inputs, inputs))


def one_by_one(weight: np.ndarray, hessian: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The same greedy order without a factorisation: rounds an input, then solves for the others anew."""
    order = np.argsort(-np.diag(hessian), kind="stable")
    damped = hessian + DAMPING * np.diag(hessian).mean() * np.eye(len(hessian))
    left = weight.astype(np.float64).copy()
    for place, i in enumerate(order):
        rounded = np.clip(np.rint(left[:, i] / scale), *BOUNDS) * scale
        error, left[:, i] = left[:, i] - rounded, rounded
        rest = order[place + 1 :]
        if len(rest):
            left[:, rest] += np.outer(error, np.linalg.solve(damped[np.ix_(rest, rest)], damped[rest, i]))
    return np.rint(left / scale[:, None]).astype(np.int32)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 99))
def test_gptq_is_the_greedy_solution(inputs, outputs, seed):
    x = correlated(100, inputs, seed)
    weight = np.random.default_rng(seed).standard_normal((outputs, inputs)).astype(np.float32)
    scale = np.abs(weight).max(axis=1) / 20
    hessian = x.T @ x
    found = gptq(weight, hessian.astype(np.float32), scale, BOUNDS)
    expected = one_by_one(weight, hessian, scale)
    assert (found != expected).mean() < 0.05  # float32 rounds a tie to the other side now and then


@pytest.mark.parametrize("inputs", [24, 300])  # within one block, and beyond
@pytest.mark.parametrize("per_channel", [False, True])
def test_gptq_makes_outputs_better_than_nearest(inputs, per_channel):
    x = correlated(1000, inputs)
    weight = np.random.default_rng(1).standard_normal((16, inputs)).astype(np.float32)
    scale = np.abs(weight).max(axis=1) / 7 if per_channel else np.abs(weight).max() / 7
    steps = np.broadcast_to(np.reshape(scale, (-1, 1)), (16, 1))
    found = gptq(weight, (x.T @ x).astype(np.float32), scale, (-7, 7))
    nearest = np.clip(np.rint(weight / steps), -7, 7)
    assert found.dtype == np.int32
    assert np.abs(found).max() <= 7
    errors = [np.square((weight - q * steps) @ x.T).sum() for q in (found, nearest)]
    assert errors[0] < errors[1] / 2


def test_gptq_of_independent_inputs_is_nearest():
    weight = np.random.default_rng(0).standard_normal((5, 9)).astype(np.float32)
    np.testing.assert_array_equal(gptq(weight, np.eye(9), np.float32(0.1), BOUNDS), np.rint(weight / np.float32(0.1)))


def test_gptq_rounds_dead_inputs_to_nearest():
    x = correlated(100, 6)
    x[:, [1, 4]] = 0
    weight = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    found = gptq(weight, x.T @ x, np.full(5, 0.1, np.float32), BOUNDS)
    np.testing.assert_array_equal(found[:, [1, 4]], np.rint(weight[:, [1, 4]] / np.float32(0.1)))
    np.testing.assert_array_equal(gptq(weight, np.zeros((6, 6)), np.float32(0.1), BOUNDS), np.rint(weight / 0.1))


@pytest.mark.parametrize(
    ("size", "weight", "attributes"),
    [
        ((2, 4, 7, 6), (5, 4, 3, 3), ""),
        ((2, 4, 7, 6), (6, 2, 3, 2), "<group = 2, strides = [2, 1], pads = [1, 0, 2, 1]>"),
        ((2, 4, 9, 9), (4, 1, 3, 3), "<group = 4, dilations = [2, 3]>"),
        ((2, 3, 8), (5, 3, 3), "<strides = [2], pads = [1, 0]>"),
        ((1, 2, 4, 5, 4), (3, 2, 2, 3, 1), "<strides = [1, 2, 1]>"),
        ((2, 3, 7, 8), (5, 3, 4, 3), '<auto_pad = "SAME_UPPER", strides = [2, 3]>'),
        ((2, 3, 7, 8), (5, 3, 4, 3), '<auto_pad = "SAME_LOWER">'),
        ((2, 3, 7, 8), (5, 3, 4, 3), '<auto_pad = "VALID">'),
    ],
)
def test_positions_are_what_a_conv_reads(weighted, monkeypatch, size, weight, attributes):
    monkeypatch.setattr(hessians_module, "POSITIONS", 10**6)
    dims = ",".join("NMOPQ"[: len(size)])
    graph = weighted(
        f"g (float[{','.join(map(str, size))}] x, float[{','.join(map(str, weight))}] w) => (float[{dims}] y) {{"
        f" y = Conv {attributes} (x, w) }}"
    )
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    (layer,) = layers(graph)
    rows = positions(layer, x, np.random.default_rng(0))
    kernels = layer.load().reshape(layer.groups, -1, rows.shape[1] // layer.groups)
    found = np.einsum("rgi,goi->rgo", rows.reshape(len(rows), layer.groups, -1), kernels).reshape(len(rows), -1)
    expected = np.moveaxis(probe.run(graph, {"x": x})["y"], 1, -1).reshape(-1, weight[0])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


LAYERS = """g (float[N,4,6,6] x, float[8,4,3,3] w1, float[8,4,1,1] w2, float[8,5] w3, float[5,5] w4) => (float[N,5] y) {
    r = Relu(x)  a = Conv(r, w1)  b = Relu(a)  c = Conv <group = 2> (b, w2)
    d = ReduceMean <axes = [2, 3], keepdims = 0> (c)  e = MatMul(d, w3)  y = Gemm <transB = 1> (e, w4) }"""


@pytest.fixture
def samples() -> Samples:
    x = correlated(24 * 36, 4).reshape(24, 36, 4).transpose(0, 2, 1).reshape(24, 4, 6, 6).astype(np.float32)
    return Samples({"x": x[i : i + 6]} for i in range(0, 24, 6))


def plan(graph, levels: int = 7, axis: bool = True) -> dict[Weight, Parameters]:
    found = {}
    for layer in layers(graph):
        chosen = weight_parameters(constant(layer.weight), layer.output_axis if axis else None, ir.DataType.INT8)
        coarse = Parameters(chosen.scale * np.float32(127 / levels), chosen.zero_point, chosen.axis, limit=levels)
        found[Weight(Use(layer.node, 1), chosen.axis)] = coarse
    return found


def error(graph, rounded, samples) -> float:
    copy = graph.clone()
    for node in copy.model.graph:
        for weight, found in rounded.items():
            if weight.use.node.outputs[0].name == node.outputs[0].name:
                assign(node.inputs[1], found.real())
    return sum(float(np.square(probe.run(copy, s)["y"] - probe.run(graph, s)["y"]).sum()) for s in samples)


@pytest.mark.parametrize("axis", [False, True])
def test_rounds_a_graph_better_than_nearest(weighted, samples, axis):
    graph = weighted(LAYERS)
    parameters = plan(graph, axis=axis)
    before = graph.fingerprint()
    rounded, refusals = round_weights(graph, parameters, samples)
    assert graph.fingerprint() == before
    assert refusals == []
    for weight, found in rounded.items():
        assert found.array.dtype == np.int8
        assert found.array.shape == weight.value.shape
        assert np.abs(found.array).max() <= 7
    nearest = {weight: Quantized.nearest(constant(weight.value), p) for weight, p in parameters.items()}
    assert error(graph, rounded, samples) < error(graph, nearest, samples) / 2


def test_memory_bounds_passes_and_not_results(weighted, samples, monkeypatch):
    graph = weighted(LAYERS)
    parameters = plan(graph)
    expected, _ = round_weights(graph, parameters, samples)
    monkeypatch.setattr(hessians_module, "BUDGET_BYTES", 1)
    runs = []
    tapped = hessians_module.Tapped
    monkeypatch.setattr(hessians_module, "Tapped", lambda *a, **k: (runs.append(a), tapped(*a, **k))[1])
    found, _ = round_weights(graph, parameters, samples)
    assert len(runs) == 4
    for weight in parameters:
        np.testing.assert_array_equal(found[weight].array, expected[weight].array)


def test_layers_that_read_the_same_share_a_hessian(weighted, samples, monkeypatch):
    monkeypatch.setattr(hessians_module, "ROWS", 10)
    graph = weighted("""g (float[N,4,6,6] x, float[8,4,1,1] q, float[8,4,1,1] k, float[8,4,3,3] v)
        => (float[N,8,6,6] y) {
        a = Conv(x, q)  b = Conv(x, k)  c = Conv <pads = [1, 1, 1, 1]> (x, v)  d = Add(a, b)  y = Add(c, d) }""")
    found = list(hessians(graph, list(layers(graph)), samples))
    assert [[layer.name for layer in alike] for alike, _ in found] == [["a", "b"], ["c"]]
    assert [hessian.shape for _, hessian in found] == [(1, 4, 4), (1, 36, 36)]


def test_no_samples_no_hessians(weighted):
    graph = weighted(LAYERS)
    assert not list(hessians(graph, list(layers(graph)), Samples()))


@pytest.mark.parametrize(
    ("body", "place", "axis", "dtype", "reason"),
    [
        ("b = MatMul(x, w)  c = MatMul(x, w)  y = Add(b, c)", 1, 1, "INT8", "its weights are shared"),
        ("b = MatMul(x, w)  y = Add(b, x)", 1, 0, "INT8", "its scales are not those of output channels"),
        ("b = MatMul(w, x)  y = Add(b, x)", 0, 0, "INT8", "it is not the weight of a Conv, Gemm or MatMul"),
        ("b = MatMul(x, w)  y = Add(b, x)", 1, 1, "FLOAT8E4M3FN", "it becomes FLOAT8E4M3FN"),
    ],
)
def test_what_cannot_be_rounded_goes_to_nearest(weighted, body, place, axis, dtype, reason):
    graph = weighted("g (float[4,4] x, float[4,4] w) => (float[4,4] y) { " + body + " }")
    weight = Weight(Use(graph.model.graph[0], place), axis, ir.DataType[dtype])
    parameters = weight_parameters(constant(weight.value), axis, weight.dtype)
    rounded, refusals = round_weights(graph, {weight: parameters}, Samples([{"x": np.eye(4, dtype=np.float32)}]))
    assert [(r.reason, r.node) for r in refusals] == [(f"rounded to nearest: {reason}", "b")]
    np.testing.assert_array_equal(rounded[weight].array, parameters.quantize(constant(weight.value)))
