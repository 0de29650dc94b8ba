from __future__ import annotations

import types

import numpy as np
import pytest

from enginesmith.compiler.graph import probe
from enginesmith.compiler.graph.probe import Tapped
from enginesmith.compiler.quantization.layers import layers, operand
from enginesmith.compiler.quantization.smooth import is_convolutional, smooth

TOKENS = (np.random.default_rng(0).standard_normal((2, 3, 4)) * [1, 40, 0.2, 3]).astype(np.float32)
ATTENTION = """g (float[2,3,4] x, float[4] s, float[4] b, float[4,4] q, float[4,4] k, float[4,4] v)
    => (float[2,3,4] y) {
    NORMAL  qa = MatMul(n, q)  ka = MatMul(n, k)  va = MatMul(n, v)  c = Add(qa, ka)  y = Add(c, va)  }"""
NORMALS = [
    "n = LayerNormalization(x, s, b)",
    "m = Sigmoid(x)  h = Mul(m, s)  n = Add(h, b)",
]


def statistics(graph, x):
    names = [operand(layer.node, 0).name for layer in layers(graph)]
    found = Tapped(graph, names)({"x": x})
    rows = {name: found[name].reshape(-1, found[name].shape[-1]) for name in names}
    return {
        name: types.SimpleNamespace(channel_low=array.min(axis=0), channel_high=array.max(axis=0), channel_axis=-1)
        for name, array in rows.items()
    }


@pytest.mark.parametrize("normal", NORMALS)
def test_folds_one_scale_for_all_readers(weighted, normal):
    graph = weighted(ATTENTION.replace("NORMAL", normal))
    before = probe.run(graph, {"x": TOKENS})["y"]
    operators = graph.operators()
    assert smooth(graph, statistics(graph, TOKENS), 0.5) == ({"inputs smoothed": 1}, [])
    graph.verify()
    assert graph.operators() == operators
    np.testing.assert_allclose(probe.run(graph, {"x": TOKENS})["y"], before, rtol=1e-4, atol=1e-4)
    after = statistics(graph, TOKENS)["n"]
    activations = np.maximum(np.abs(after.channel_low), np.abs(after.channel_high))
    weights = np.max([layer.input_range() for layer in layers(graph)], axis=0)
    np.testing.assert_allclose(activations, weights, rtol=1e-4)  # alpha one half: both become sqrt(x w)


WIDE = (np.random.default_rng(0).standard_normal((2, 3, 32)) * ([60] + [1] * 31)).astype(np.float32)
WIDE_RESIDUAL = """g (float[2,3,32] x, float[32,32] w, float[32,32] u) => (float[2,3,32] y) {
    n = Abs(x)  a = MatMul(n, w)  c = MatMul(n, u)  d = Add(a, c)  y = Add(d, n) }"""
RESIDUAL = """g (float[2,3,4] x, float[4,4] w, float[4,4] u) => (float[2,3,4] y) {
    n = Tanh(x)  a = MatMul(n, w)  c = MatMul(n, u)  d = Add(a, c)  y = Add(d, n) }"""


def test_a_residual_takes_a_mul(weighted):
    graph = weighted(WIDE_RESIDUAL)
    before = probe.run(graph, {"x": WIDE})["y"]
    changes, refusals = smooth(graph, statistics(graph, WIDE), 0.8)
    graph.verify()
    assert changes == {"inputs smoothed by a Mul": 1}
    assert [r.reason for r in refusals] == ["it takes a Mul: 'n' is read by Add 'y' too"]
    assert graph.operators() == {"Abs": 1, "Mul": 1, "MatMul": 2, "Add": 2}
    np.testing.assert_allclose(probe.run(graph, {"x": WIDE})["y"], before, rtol=1e-4, atol=1e-2)


def test_a_mul_must_gain_enough(weighted):
    graph = weighted(RESIDUAL)
    before = graph.fingerprint()
    changes, refusals = smooth(graph, statistics(graph, TOKENS), 0.5)
    assert changes == {}
    assert [r.reason[:12] for r in refusals] == ["a Mul would "]
    assert "dB, too little: 'n' is read by Add 'y' too" in refusals[0].reason
    assert graph.fingerprint() == before


def test_a_residual_is_refused_a_mul(weighted):
    graph = weighted(RESIDUAL)
    before = graph.fingerprint()
    changes, refusals = smooth(graph, statistics(graph, TOKENS), 0.5, insert=False)
    assert changes == {}
    assert [(r.reason, r.node) for r in refusals] == [("'n' is read by Add 'y' too", "a")]
    assert graph.fingerprint() == before


def test_dead_channels_keep_their_scale(weighted):
    graph = weighted(RESIDUAL)
    x = TOKENS * np.float32([1, 0, 1, 1])
    before = probe.run(graph, {"x": x})["y"]
    smooth(graph, statistics(graph, x), 0.8)
    np.testing.assert_allclose(probe.run(graph, {"x": x})["y"], before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("body", "change", "reason"),
    [
        ("y = MatMul(n, w)", {"w": np.inf}, "weights that read 'n' hold NaN or Inf"),
        ("y = MatMul(n, w)", {"n": None}, "the ranges of the channels of 'n' are not known"),
        ("y = MatMul(n, w)", {"axis": 1}, "the ranges of 'n' are along another axis"),
        ("a = MatMul(n, w)  b = MatMul(n, w)  y = Add(a, b)", {}, "the weights of 'a' are shared"),
    ],
)
def test_refuses(weighted, body, change, reason):
    graph = weighted("g (float[2,3,4] x, float[4,4] w) => (float[2,3,4] y) { n = Tanh(x)  " + body + " }")
    found = statistics(graph, TOKENS)
    if "n" in change:
        found = {}
    if "w" in change:
        (layer,) = layers(graph)
        layer.store(layer.load() * change["w"])
    if "axis" in change:
        found["n"].channel_axis = 1
    before = graph.fingerprint()
    changes, refusals = smooth(graph, found, 0.5)
    assert changes == {}
    assert [refusal.reason for refusal in refusals] == [reason]
    assert graph.fingerprint() == before


@pytest.mark.parametrize(("convolutions", "products", "expected"), [(2, 1, True), (1, 2, False), (0, 0, True)])
def test_a_graph_is_convolutional_where_products_are_few(weighted, convolutions, products, expected):
    body = [f"c{i + 1} = Conv(c{i}, w)" for i in range(convolutions)]
    body += [f"p{i + 1} = MatMul({f'p{i}' if i else f'c{convolutions}'}, v)" for i in range(products)]
    last = f"y = Relu({f'p{products}' if products else f'c{convolutions}'})"
    head = "g (float[1,4,4,4] x, float[4,4,1,1] w, float[4,4] v) => (float[1,4,4,4] y)"
    graph = weighted(f"{head} {{ c0 = Abs(x) {' '.join(body)} {last} }}")
    assert is_convolutional(graph) == expected
