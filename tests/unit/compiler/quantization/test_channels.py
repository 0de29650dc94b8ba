from __future__ import annotations

import numpy as np
import pytest

from enginesmith.compiler.graph import probe
from enginesmith.compiler.quantization.channels import UnfoldableError, source
from enginesmith.compiler.quantization.layers import as_layer, layers

IMAGE = np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)
TOKENS = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)


def value(graph, name):
    return next(v for node in graph.model.graph for v in node.outputs if v.name == name)


def convolutional(body: str, weights: str = "float[4,4,3,3] w, float[4] b") -> str:
    return f"g (float[2,4,6,6] x, {weights}) => (float[N,M,O,P] y) {{ {body}  y = Neg(v) }}"


def linear(body: str, weights: str = "float[4,4] w") -> str:
    return f"g (float[2,3,4] x, {weights}) => (float[N,M,O] y) {{ {body}  y = Neg(v) }}"


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        (convolutional("v = Conv(x, w, b)"), 1),
        (convolutional("v = Conv <group = 2> (x, w, b)", "float[4,2,3,3] w, float[4] b"), 1),
        (convolutional("a = Conv(x, w)  v = Relu(a)", "float[4,4,3,3] w"), 1),
        (
            convolutional(
                "a = Conv(x, w, b)  c = LeakyRelu <alpha = 0.1> (a)  v = MaxPool <kernel_shape = [2, 2]> (c)"
            ),
            1,
        ),
        (convolutional("a = Conv(x, w)  v = PRelu(a, p)", "float[4,4,3,3] w, float[4,1,1] p"), 1),
        (convolutional("a = Conv(x, w, b)  c = AveragePool <kernel_shape = [2, 2]> (a)  v = GlobalAveragePool(c)"), 1),
        (convolutional("a = Conv(x, w)  v = Add(k, a)", "float[4,4,3,3] w, float[4,1,1] k"), 1),
        (convolutional("v = BatchNormalization(x, s, k, m, u)", "float[4] s, float[4] k, float[4] m, float[4] u"), 1),
        (convolutional("v = InstanceNormalization(x, s, k)", "float[4] s, float[4] k"), 1),
        (linear("v = MatMul(x, w)"), 2),
        (linear("a = MatMul(x, w)  v = Add(a, k)", "float[4,4] w, float[4] k"), 2),
        (linear("a = MatMul(x, w)  v = Sub(k, a)", "float[4,4] w, float[1,4] k"), 2),
        (linear("v = LayerNormalization <axis = -1> (x, s, k)", "float[4] s, float[4] k"), 2),
        (linear("v = LayerNormalization(x, s)", "float[4] s"), 2),
        (linear("a = Sigmoid(x)  c = Mul(a, s)  v = Add(c, k)", "float[4] s, float[4] k"), 2),
    ],
)
def test_divides_every_channel(weighted, text, axis):
    graph = weighted(text)
    inputs = {"x": IMAGE if "x, " in text and "6,6] x" in text else TOKENS}
    for initializer in graph.model.graph.initializers.values():
        if initializer.name == "u":  # a variance
            initializer.const_value = type(initializer.const_value)(np.abs(initializer.const_value.numpy()), name="u")
    before = probe.run(graph, inputs)["y"]
    factor = np.array([0.5, 3, 1, 7])
    source(value(graph, "v"), axis).divide(graph, factor)
    graph.verify()
    shape = [1] * before.ndim
    shape[axis] = 4
    np.testing.assert_allclose(probe.run(graph, inputs)["y"], before / factor.reshape(shape), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("axes", ["axes = [2, 3]", "axes = [2, 3], keepdims = 0", "axes = [-1, 0], keepdims = 0"])
def test_follows_channels_through_reductions(weighted, axes):
    rank = 4 - ("keepdims" in axes) * 2
    shape = ",".join("NMOP"[:rank])
    graph = weighted(
        "g (float[2,4,6,6] x, float[4,4,1,1] w) => (float[" + shape + "] y) {"
        f" a = Conv(x, w)  v = ReduceMean <{axes}> (a)  y = Neg(v) }}"
    )
    before = probe.run(graph, {"x": IMAGE})["y"]
    factor = np.array([0.5, 3, 1, 7])
    axis = 0 if "0]" in axes else 1
    source(value(graph, "v"), axis).divide(graph, factor)
    along = factor.reshape([4 if i == axis else 1 for i in range(rank)])
    np.testing.assert_allclose(probe.run(graph, {"x": IMAGE})["y"], before / along, rtol=1e-5, atol=1e-6)


def test_follows_channels_through_flatten(weighted):
    graph = weighted("""g (float[2,4,6,6] x, float[4,4,1,1] w) => (float[2,4] y) {
        a = Conv(x, w)  b = GlobalAveragePool(a)  v = Flatten(b)  y = Neg(v) }""")
    before = probe.run(graph, {"x": IMAGE})["y"]
    factor = np.array([0.5, 3, 1, 7])
    source(value(graph, "v"), 1).divide(graph, factor)
    np.testing.assert_allclose(probe.run(graph, {"x": IMAGE})["y"], before / factor, rtol=1e-5, atol=1e-6)


def test_refuses_a_flatten_that_mixes(weighted):
    graph = weighted("""g (float[2,4,6,6] x, float[4,4,1,1] w) => (float[2,144] y) {
        a = Conv(x, w)  v = Flatten(a)  y = Neg(v) }""")
    with pytest.raises(UnfoldableError, match="Flatten 'v' mixes channels with positions"):
        source(value(graph, "v"), 1)


def test_constants_that_others_use_stay(weighted):
    graph = weighted("""g (float[2,3,4] x, float[4] s) => (float[2,3,4] y, float[2,3,4] z) {
        a = Sigmoid(x)  v = Mul(a, s)  y = Neg(v)  z = Mul(x, s) }""")
    before = probe.run(graph, {"x": TOKENS})
    source(value(graph, "v"), 2).divide(graph, np.full(4, 2.0))
    after = probe.run(graph, {"x": TOKENS})
    np.testing.assert_allclose(after["y"], before["y"] / 2, rtol=1e-6)
    np.testing.assert_array_equal(after["z"], before["z"])


@pytest.mark.parametrize(
    ("text", "axis", "reason"),
    [
        (convolutional("a = Conv(x, w, b)  v = Clip(a)"), 1, "Clip 'v' does not pass a factor"),
        (convolutional("a = Conv(x, w, b)  v = Sigmoid(a)"), 1, "Sigmoid 'v' does not pass"),
        (convolutional("v = Conv(x, w, b)"), 2, "lie along another axis"),
        (convolutional("v = Relu(x)"), 1, "'x' is an input of the model"),
        (convolutional("a = Conv <pads = [1, 1, 1, 1]> (x, w, b)  v = Add(a, x)"), 1, "Add 'v' joins two branches"),
        (convolutional("a = Conv(x, w, b)  c = Relu(a)  v = Add(c, k)", "float[4,4,3,3] w, float[4] b, float[1] k"), 1,
         "'k' of 'v' is not one constant a channel"),
        (convolutional("a = Conv(x, w, b)  v = ReduceMean <axes = [1]> (a)"), 1, "reduces the channels"),
        (convolutional("a = Conv(x, w, b)  v = ReduceMean(a)"), 1, "reduces axes that are not known"),
        (linear("v = LayerNormalization <axis = 1> (x, s)", "float[3,4] s"), 2, "normalizes over other axes"),
        (linear("a = MatMul(x, w)  v = MatMul(a, w)"), 2, "the weights of 'v' are shared"),
        (linear("a = MatMul(x, w)  c = Sigmoid(a)  d = Relu(a)  v = Relu(a)"), 2, "'a' has other uses"),
    ],
)  # fmt: skip
def test_refuses(weighted, text, axis, reason):
    graph = weighted(text)
    before = graph.fingerprint()
    with pytest.raises(UnfoldableError, match=reason):
        source(value(graph, "v"), axis)
    assert graph.fingerprint() == before


def test_outputs_of_the_model_are_refused(weighted):
    graph = weighted("g (float[2,3,4] x, float[4,4] w) => (float[2,3,4] y) { y = MatMul(x, w) }")
    with pytest.raises(UnfoldableError, match="'y' is an output of the model"):
        source(value(graph, "y"), 2)


@pytest.mark.parametrize(
    "body",
    [
        "y = Gemm <transA = 1> (x, w)",
        "y = Gemm <alpha = 2.0> (x, w)",
        "y = Gemm <beta = 0.5> (x, w)",
        "y = MatMul(w, x)",
        "y = MatMul(x, x)",
        "a = Neg(w)  y = MatMul(x, a)",
    ],
)
def test_what_is_no_layer(weighted, body):
    graph = weighted("g (float[4,4] x, float[4,4] w) => (float[4,4] y) { " + body + " }")
    assert not list(layers(graph))


def test_a_weight_that_callers_may_replace_is_no_constant(read):
    graph = read("g (float[1,1] x, float[1,1] w = {2}) => (float[1,1] y) { y = MatMul(x, w) }")
    assert as_layer(graph.model.graph[0]) is None
