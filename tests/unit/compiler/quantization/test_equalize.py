from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enginesmith.compiler.graph import probe
from enginesmith.compiler.quantization.channels import source
from enginesmith.compiler.quantization.equalize import equalize
from enginesmith.compiler.quantization.layers import assign, constant, layers, operand
from enginesmith.compiler.quantization.parameters import weight_parameters

IMAGE = np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)
CHAIN = """g (float[2,4,6,6] x, float[8,4,3,3] w1, float[8] b1, float[8,1,3,3] w2, float[8] b2, float[6,8,1,1] w3,
           float[6,5] w4, float[5] b4) => (float[2,5] y) {
    a = Conv(x, w1, b1)  c = Relu(a)  d = Conv <group = 8> (c, w2, b2)  e = Relu(d)  f = Conv(e, w3)
    h = ReduceMean <axes = [2, 3], keepdims = 0> (f)  y = Gemm(h, w4, b4) }"""


def test_ranges_meet_and_the_function_stays(weighted):
    graph = weighted(CHAIN)
    before = probe.run(graph, {"x": IMAGE})["y"]
    changes, refusals = equalize(graph)
    graph.verify()
    assert changes == {"layers equalized": 3}
    assert [(refusal.node, refusal.reason) for refusal in refusals] == [("a", "'x' is an input of the model")]
    np.testing.assert_allclose(probe.run(graph, {"x": IMAGE})["y"], before, rtol=1e-4, atol=1e-4)
    chain = list(layers(graph))
    for first, second in itertools.pairwise(chain):
        np.testing.assert_allclose(first.output_range(), second.input_range(), rtol=2e-3)


@settings(deadline=None, max_examples=15)
@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_groups(weighted, first, second, seed):
    graph = weighted(
        f"""g (float[2,4,6,6] x, float[8,{4 // first},3,3] w1, float[4,{8 // second},3,3] w2) => (float[N,M,O,P] y) {{
        a = Conv <group = {first}> (x, w1)  c = LeakyRelu(a)  y = Conv <group = {second}> (c, w2) }}""",
        seed,
    )
    before = probe.run(graph, {"x": IMAGE})["y"]
    assert equalize(graph)[0] == {"layers equalized": 1}
    np.testing.assert_allclose(probe.run(graph, {"x": IMAGE})["y"], before, rtol=1e-4, atol=1e-3)
    one, two = layers(graph)
    np.testing.assert_allclose(one.output_range(), two.input_range(), rtol=1e-3)


def test_mends_channels_of_uneven_range(weighted):
    graph = weighted(CHAIN)
    equalize(graph)
    factor = np.geomspace(0.01, 100, 8)
    first, second, *_ = layers(graph)
    source(operand(second.node, 0), 1).divide(graph, factor)
    second.scale_inputs(factor)
    assert first.output_range().max() > 1000 * first.output_range().min()
    expected = probe.run(graph, {"x": IMAGE})["y"]

    def error(graph):
        rounded = graph.clone()
        for layer in layers(rounded):
            assign(
                layer.weight,
                weight_parameters(constant(layer.weight), None, ir.DataType.INT8).round(constant(layer.weight)),
            )
        return np.square(probe.run(rounded, {"x": IMAGE})["y"] - expected).sum()

    before = error(graph)
    equalize(graph)
    assert error(graph) < before / 100


def test_dead_channels_keep_their_scale(weighted):
    graph = weighted(CHAIN)
    first = next(layers(graph))
    weight = first.load().copy()
    weight[3] = 0
    assign(first.weight, weight)
    equalize(graph)
    assert all(np.isfinite(layer.load()).all() for layer in layers(graph))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("c = Relu(a)  d = Neg(c)  e = Conv(c, w2)  y = Add(d, e)", "'c' has other uses"),
        ("c = Clip(a)  y = Conv(c, w2)", "Clip 'c' does not pass a factor for each channel through"),
        ("c = Conv(a, w2)  y = Conv(c, w2)", "its weights are shared"),
        ("c = Add(a, x)  y = Conv(c, w2)", "Add 'c' joins two branches"),
        ("d = Sigmoid(a)  c = Mul(d, k)  y = Conv(c, w2)", "the channels of 'c' come from no layer"),
    ],
)
def test_refuses(weighted, body, reason):
    graph = weighted(
        "g (float[2,4,6,6] x, float[4,4,1,1] w1, float[4,4,1,1] w2, float[4,1,1] k) => (float[2,4,6,6] y) {"
        f" a = Conv(x, w1)  {body} }}"
    )
    before = graph.fingerprint()
    changes, refusals = equalize(graph)
    assert changes == {}
    assert reason in [refusal.reason for refusal in refusals]
    assert graph.fingerprint() == before
