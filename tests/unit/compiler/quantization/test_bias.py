from __future__ import annotations

import types

import numpy as np
import onnx_ir as ir
import pytest

from enginesmith.compiler.graph import probe
from enginesmith.compiler.quantization.bias import correct
from enginesmith.compiler.quantization.layers import as_layer, assign, constant, layers
from enginesmith.compiler.quantization.parameters import weight_parameters
from enginesmith.compiler.quantization.plan import Use, Weight
from enginesmith.compiler.quantization.qdq import Quantized

GENERATOR = np.random.default_rng(0)
IMAGE = GENERATOR.normal(np.reshape([3, -2, 0, 1], (4, 1, 1)), 1, (8, 4, 6, 6)).astype(np.float32)
ROWS = IMAGE.transpose(0, 2, 3, 1).reshape(-1, 4)


def means(array: np.ndarray, axis: int) -> dict[str, types.SimpleNamespace]:
    reduced = tuple(i for i in range(array.ndim) if i != axis % array.ndim)
    return {"x": types.SimpleNamespace(channel_mean=array.mean(axis=reduced), channel_axis=axis)}


def quantized(graph, levels_lost: float = 20) -> dict[Weight, Quantized]:
    """Every layer's weights in steps so coarse that the mean of the output moves."""
    found = {}
    for layer in layers(graph):
        parameters = weight_parameters(constant(layer.weight), layer.output_axis, ir.DataType.INT8)
        coarse = type(parameters)(parameters.scale * np.float32(levels_lost), parameters.zero_point, parameters.axis)
        found[Weight(Use(layer.node, 1), layer.output_axis)] = Quantized.nearest(constant(layer.weight), coarse)
    return found


def run_with(graph, weights, inputs):
    copy = graph.clone()
    for node in copy.model.graph:
        for weight, found in weights.items():
            if as_layer(node) is not None and node.outputs[0].name == weight.use.node.outputs[0].name:
                assign(node.inputs[1], found.real())
    return probe.run(copy, inputs)["y"]


@pytest.mark.parametrize(
    ("text", "x", "axis"),
    [
        ("g (float[8,4,6,6] x, float[5,4,1,1] w, float[5] b) => (float[8,5,6,6] y) { y = Conv(x, w, b) }", IMAGE, 1),
        ("g (float[8,4,6,6] x, float[6,2,1,1] w) => (float[8,6,6,6] y) { y = Conv <group = 2> (x, w) }", IMAGE, 1),
        ("g (float[288,4] x, float[4,3] w, float[3] b) => (float[288,3] y) { y = Gemm(x, w, b) }", ROWS, -1),
        ("g (float[288,4] x, float[3,4] w) => (float[288,3] y) { y = Gemm <transB = 1> (x, w) }", ROWS, -1),
        (
            "g (float[288,4] x, float[4,3] w, float[3] b) => (float[288,3] y) { a = MatMul(x, w)  y = Add(b, a) }",
            ROWS,
            -1,
        ),
        (
            "g (float[288,4] x, float[4,3] w, float[1] b) => (float[288,3] y) { a = MatMul(x, w)  y = Add(a, b) }",
            ROWS,
            -1,
        ),
    ],
)
def test_the_mean_of_the_output_comes_back(weighted, text, x, axis):
    graph = weighted(text)
    channel = 1
    kept = tuple(i for i in range(x.ndim) if i != channel)
    expected = probe.run(graph, {"x": x})["y"].mean(axis=kept)
    weights = quantized(graph)
    assert np.abs(run_with(graph, weights, {"x": x}).mean(axis=kept) - expected).max() > 0.05
    changes, refusals = correct(graph, weights, means(x, axis))
    graph.verify()
    assert changes == {"biases corrected": 1}
    assert refusals == []
    np.testing.assert_allclose(run_with(graph, weights, {"x": x}).mean(axis=kept), expected, atol=2e-5)


def test_a_bias_that_others_use_stays(weighted):
    graph = weighted("""g (float[288,4] x, float[4,3] w, float[3] b) => (float[288,3] y, float[3] z) {
        y = Gemm(x, w, b)  z = Neg(b) }""")
    before = probe.run(graph, {"x": ROWS})["z"]
    correct(graph, quantized(graph), means(ROWS, -1))
    np.testing.assert_array_equal(probe.run(graph, {"x": ROWS})["z"], before)


@pytest.mark.parametrize(
    ("body", "statistics", "reason"),
    [
        ("y = MatMul(x, w)", means(ROWS, -1), "no Add follows this MatMul alone"),
        ("a = MatMul(x, w)  c = Add(a, b)  d = Neg(a)  y = Add(c, d)", means(ROWS, -1), "no Add follows"),
        ("a = MatMul(x, w)  y = Add(a, x)", means(ROWS, -1), "the bias 'x' is not constant"),
        ("y = Gemm(x, w, k)", means(ROWS, -1), "the bias 'k' is not one number for each output"),
        ("y = Gemm(x, w, b)", {}, "the means of the channels of 'x' are not known"),
        ("y = Gemm(x, w, b)", means(ROWS, 0), "the means of 'x' are along another axis"),
    ],
)
def test_refuses(weighted, body, statistics, reason):
    graph = weighted(
        "g (float[288,4] x, float[4,4] w, float[4] b, float[288,1] k) => (float[288,4] y) { " + body + " }"
    )
    before = graph.fingerprint()
    changes, refusals = correct(graph, quantized(graph), statistics)
    assert changes == {}
    assert [refusal.reason for refusal in refusals if reason in refusal.reason]
    assert graph.fingerprint() == before
