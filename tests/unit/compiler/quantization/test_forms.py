from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enginesmith.compiler.graph import probe
from enginesmith.compiler.quantization.forms import prepare

X = np.random.default_rng(0).standard_normal((2, 3, 4, 6)).astype(np.float32)


def check(graph, expected_operators, changes, x) -> None:
    """The graph computes as before, and its values say their shapes."""
    before = graph.clone()
    assert prepare(graph) == changes
    shapes = {v.name: str(v.shape) for n in graph.nodes() for v in n.outputs}
    graph.infer()
    graph.verify()
    assert shapes == {v.name: str(v.shape) for n in graph.nodes() for v in n.outputs}
    assert dict(graph.operators()) == expected_operators
    expected, found = probe.run(before, {"x": x}), probe.run(graph, {"x": x})
    assert list(expected) == list(found)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)
    assert prepare(graph) == {}


@pytest.mark.parametrize(
    ("node", "shape", "operators"),
    [
        ("ReduceMean<axes=[2,3]>(x)", "N,3,1,1", {"GlobalAveragePool": 1}),
        ("ReduceMean<axes=[-1,-2], keepdims=0>(x)", "N,3", {"GlobalAveragePool": 1, "Flatten": 1}),
    ],
)
def test_a_mean_over_all_positions_is_pooling(read, node, shape, operators):
    graph = read(f"g (float[N,3,4,6] x) => (float[{shape}] y) {{ y = {node} }}")
    check(graph, operators, {"ReduceMean to GlobalAveragePool": 1}, X)


def test_axes_may_be_an_input(read):
    header = '<ir_version: 8, opset_import: ["": 18]>\n'
    graph = read(header + "g (float[N,3,4,6] x) => (float[N,3,1,1] y) <int64[2] a = {2, 3}> { y = ReduceMean(x, a) }")
    check(graph, {"GlobalAveragePool": 1}, {"ReduceMean to GlobalAveragePool": 1}, X)


@pytest.mark.parametrize("axes", ["axes=[1]", "axes=[2]", "axes=[1,2,3]", "keepdims=1"])
def test_other_means_stay(read, axes):
    graph = read(f"g (float[N,3,4,6] x) => (float[A,B,C,D] y) {{ y = ReduceMean<{axes}>(x) }}")
    assert prepare(graph) == {}


NORM = """g (float[N,3,4,6] x, float[2,3,1,1] w, float[3] b, float[3] m) => (float[N,2,4,6] y)
    <float[3] s = {1, 2, 3}, float[3] v = {0.5, 1, 2}>
    { a = Add(x, x) n = BatchNormalization<epsilon=0.1>(a, s, b, m, v) r = Relu(n) y = Conv(r, w) }"""


@pytest.mark.parametrize("reader", ["r = Relu(n) y = Conv(r, w)", "y = Conv(n, w)"])
def test_a_normalization_becomes_a_conv_of_single_channels(weighted, reader):
    graph = weighted(NORM.replace("r = Relu(n) y = Conv(r, w)", reader))
    operators = {"Add": 1, "Conv": 2} | ({"Relu": 1} if "Relu" in reader else {})
    check(graph, operators, {"BatchNormalization to Conv": 1}, X)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Relu(n)", "Erf(n)"),  # no Conv reads it
        ("Add(x, x)", "Erf(x)"),  # floats come in
        ("(a, s, b, m, v)", "(a, s, b, s2, v)"),
    ],
)
def test_other_normalizations_stay(weighted, old, new):
    assert prepare(weighted(NORM.replace(old, new).replace("a = ", "s2 = Neg(s) a = "))) == {}


@pytest.mark.parametrize("add", ["Add(h, b)", "Add(b, h)"])
def test_a_product_of_matrices_takes_its_bias_along(weighted, add):
    text = f"g (float[N,6] x, float[6,5] w, float[5] b) => (float[N,5] y) {{ h = MatMul(x, w) y = {add} }}"
    check(weighted(text), {"Gemm": 1}, {"MatMul to Gemm": 1}, X[0, 0])


@pytest.mark.parametrize(
    ("text", "operators"),
    [
        ("g (float[N,6] x, float[6,5] w) => (float[N,5] y) { y = MatMul(x, w) }", {"Gemm": 1}),
        (
            "g (float[N,6] x, float[6,5] w, float[5] b) => (float[N,5] y, float[N,5] h) "
            "{ h = MatMul(x, w) y = Add(h, b) }",
            {"Gemm": 1, "Add": 1},
        ),
        (
            "g (float[N,6] x, float[6,6] w) => (float[N,6] y) { h = MatMul(x, w) y = Add(h, x) }",
            {"Gemm": 1, "Add": 1},
        ),
    ],
)
def test_a_product_of_matrices_may_stand_alone(weighted, text, operators):
    check(weighted(text), operators, {"MatMul to Gemm": 1}, X[0, 0])


def test_a_bias_gets_two_dimensions_behind_a_product_of_more(weighted):
    text = """g (float[N,3,4,6] x, float[6,5] w, float[5] b) => (float[N,3,4,5] y, float[5] z)
        { h = MatMul(x, w) y = Add(h, b) z = Neg(b) }"""
    graph = weighted(text)
    check(graph, {"MatMul": 1, "Add": 1, "Neg": 1}, {"biases given two dimensions": 1}, X)
    assert {name: value.shape.numpy() for name, value in graph.model.graph.initializers.items() if "b" in name} == {
        "b": (5,),
        "b/row": (1, 5),
    }


@pytest.mark.parametrize(
    "text",
    [
        "g (float[N,6] x, float[6,5] w) => (float[N,N] y) { y = MatMul(x, t) t = Transpose(x) }",
        "g (float[N,3,4,6] x, float[6,5] w, float[1,5] b) => (float[N,3,4,5] y) { h = MatMul(x, w) y = Add(h, b) }",
        "g (float[N,3,4,6] x, float[6,5] w, float[5] b) => (float[N,3,4,5] y) { h = MatMul(x, w) y = Mul(h, b) }",
        "g (float[3,4,6] x, float[2,3,6,6] w) => (float[2,3,4,6] y) { y = MatMul(x, w) }",
    ],
)
def test_other_products_stay(weighted, text):
    if "Transpose" in text:
        text = text.replace("y = MatMul(x, t) t = Transpose(x)", "t = Transpose(x) y = MatMul(x, t)")
    assert prepare(weighted(text)) == {}


def test_nodes_that_are_kept_stay_as_they_are(weighted):
    graph = weighted("g (float[N,6] x, float[6,5] w) => (float[N,5] y) { y = MatMul(x, w) }")
    assert prepare(graph, keep=["y"]) == {}


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 7), st.integers(2, 7)),
    pads=st.tuples(*[st.integers(0, 3)] * 4),
    channels=st.integers(1, 3),
    size=st.tuples(st.sampled_from([8, 10]), st.sampled_from([8, 12])),
)
def test_a_strided_stem_computes_the_same_on_squares(weighted, kernel, pads, channels, size):
    graph = weighted(
        f"""g (float[N,{channels},{size[0]},{size[1]}] x, float[4,{channels},{kernel[0]},{kernel[1]}] w, float[4] b)
        => (float[N,4,H,W] y) {{ y = Conv<strides=[2,2], pads=[{pads[0]},{pads[1]},{pads[2]},{pads[3]}]>(x, w, b) }}"""
    )
    x = np.random.default_rng(0).standard_normal((2, channels, *size)).astype(np.float32)
    operators = {"Reshape": 3, "Transpose": 3, "Conv": 1}
    check(graph, operators, {"Conv of stride 2 to stride 1": 1}, x)


@pytest.mark.parametrize(
    ("shape", "weight", "attributes"),
    [
        ("N,4,8,8", "4,4,3,3", "strides=[2,2]"),
        ("N,3,8,8", "4,3,3,3", "strides=[1,1]"),
        ("N,3,8,8", "4,3,3,3", "strides=[2,1]"),
        ("N,3,8,8", "4,3,1,1", "strides=[2,2]"),
        ("N,3,7,8", "4,3,3,3", "strides=[2,2]"),
        ("N,3,H,8", "4,3,3,3", "strides=[2,2]"),
        ("N,3,8,8", "3,1,3,3", "strides=[2,2], group=3"),
        ("N,3,8,8", "4,3,2,2", "strides=[2,2], dilations=[2,2]"),
        ("N,3,8,8", "4,3,3,3", 'strides=[2,2], auto_pad="SAME_UPPER"'),
        ("N,3,8", "4,3,3", "strides=[2]"),
    ],
)
def test_other_convolutions_stay(weighted, shape, weight, attributes):
    result = ",".join("ABCD"[: shape.count(",") + 1])
    graph = weighted(
        f"g (float[{shape}] x, float[{weight}] w) => (float[{result}] y) {{ y = Conv<{attributes}>(x, w) }}"
    )
    assert prepare(graph) == {}
