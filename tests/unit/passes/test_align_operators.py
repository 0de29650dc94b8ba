"""Alignment through operators whose axes have layouts of their own."""

from __future__ import annotations

import numpy as np
import pytest

from enginesmith.compiler.graph import Graph, probe
from enginesmith.passes.align import Align
from enginesmith.passes.base import PassResult


def aligned(graph: Graph, context, **options) -> PassResult:
    """Aligns with a generous bound on waste, and checks that the numbers stay."""
    random = np.random.default_rng(0)
    inputs = {
        value.name: random.standard_normal([a if isinstance(a, int) else 3 for a in value.shape], dtype=np.float32)
        for value in graph.model.graph.inputs
    }
    before = probe.run(graph, inputs)
    result = Align(waste=1, **options)(graph, context(graph))
    for name, array in probe.run(graph, inputs).items():
        assert array.shape == before[name].shape
        assert np.linalg.norm(array - before[name]) <= 1e-5 * np.linalg.norm(before[name])
    return result


@pytest.mark.parametrize(
    ("text", "grown"),
    [
        # dense connections: each layer reads all before it
        ("""g (float[N,8,6,6] x) => (float[N,16,6,6] y) <float[13,8,1,1] a, float[11,21,1,1] b, float[16,32,1,1] c> {
            p = Conv(x, a)  q = Relu(p)  r = Concat<axis = 1>(x, q)  s = Conv(r, b)  t = Concat<axis = 1>(r, s)
            y = Conv(t, c) }""", {(13, 16), (11, 16)}),
        # grouped: the channels of a group
        ("""g (float[N,8,6,6] x) => (float[N,8,6,6] y) <float[20,8,1,1] a, float[20,5,3,3] b, float[8,20,1,1] c> {
            p = Conv(x, a)  q = Conv<group = 4, pads = [1,1,1,1]>(p, b)  y = Conv(q, c) }""", {(5, 8)}),
        # a decoder
        ("""g (float[N,8,6,6] x) => (float[N,8,12,12] y) <float[8,13,2,2] a, float[13] b, float[8,13,1,1] c> {
            p = ConvTranspose<strides = [2,2]>(x, a, b)  q = Relu(p)  y = Conv(q, c) }""", {(13, 16)}),
        # gates that are split
        ("""g (float[N,16] x) => (float[N,8] y) <float[16,74] a, float[37,8] b, int64[2] s = {37, 37}> {
            p = MatMul(x, a)  u, v = Split<axis = 1>(p, s)  w = Sigmoid(u)  q = Mul(w, v)  y = MatMul(q, b) }""",
         {(37, 40)}),
        # groups of channels that are normalized: whole groups
        ("""g (float[N,8,6,6] x) => (float[N,8,6,6] y) <float[12,8,1,1] a, float[3] s, float[3] h, float[12] k,
            float[8,12,1,1] c, int64[3] into = {0, 3, -1}, int64[4] back = {0, 12, 6, 6}> {
            p = Conv(x, a)  g3 = Reshape(p, into)  n = InstanceNormalization(g3, s, h)  m = Reshape(n, back)
            y = Conv(m, c) }""", {(3, 4)}),
        # queries, keys and values side by side
        ("""g (float[N,5,24] x) => (float[N,5,24] y)
            <float[24,72] a, float[24,24] o, int64[5] s = {0, 5, 3, 2, 12}, int64[3] m = {0, 5, 24}> {
            p = MatMul(x, a)  r = Reshape(p, s)  t = Transpose<perm = [2, 0, 3, 1, 4]>(r)
            q0, k0, v0 = Split<axis = 0>(t)
            first = Constant<value_ints = [0]>()
            q = Squeeze(q0, first)  k1 = Squeeze(k0, first)  v = Squeeze(v0, first)
            k = Transpose<perm = [0, 1, 3, 2]>(k1)  w = MatMul(q, k)  e = Softmax<axis = -1>(w)  c = MatMul(e, v)
            d = Transpose<perm = [0, 2, 1, 3]>(c)  f = Reshape(d, m)  y = MatMul(f, o) }""", {(12, 16)}),
        ("""<ir_version: 10, opset_import: ["": 23]>
            g (float[N,5,24] x) => (float[N,5,24] y) <float[24,24] a, float[24,24] b, float[24,24] c, float[24,24] o> {
            q = MatMul(x, a)  k = MatMul(x, b)  v = MatMul(x, c)
            t = Attention<q_num_heads = 2, kv_num_heads = 2, scale = 0.25>(q, k, v)  y = MatMul(t, o) }""", {(12, 16)}),
        ("""g (float[9,N,16] x) => (float[9,N,8] y) <float[1,39,16] w, float[1,39,13] r, float[1,78] b, float[13,8] v> {
            s, h = GRU<hidden_size = 13, linear_before_reset = 1>(x, w, r, b)  one = Constant<value_ints = [1]>()
            t = Squeeze(s, one)  y = MatMul(t, v) }""", {(13, 16)}),
    ],
    ids=["concat", "grouped", "transposed", "split", "groups", "heads", "attention", "gru"],
)  # fmt: skip
def test_grows(fill, context, text, grown):
    graph = fill(text)
    result = aligned(graph, context)
    assert grown <= {(row["before"], row["after"]) for row in result.details["aligned"]}


def test_integer_products_hold_their_zero_point(read, context):
    weight = ", ".join(str(number % 256) for number in range(16 * 31))
    second = ", ".join(str(number % 251) for number in range(31 * 8))
    graph = read(
        f"""g (float[N,16] x) => (float[N,8] y)
        <uint8[16,31] w = {{{weight}}}, uint8 p = {{128}}, uint8[31,8] v = {{{second}}}> {{
        a, b, c = DynamicQuantizeLinear(x)  h = MatMulInteger(a, w, c, p)  f = Cast<to = 1>(h)
        g1 = Mul(f, b)  r = Relu(g1)
        d, e, k = DynamicQuantizeLinear(r)  i = MatMulInteger(d, v, k, p)  j = Cast<to = 1>(i)  y = Mul(j, e) }}"""
    )
    result = aligned(graph, context)
    assert {(row["before"], row["after"]) for row in result.details["aligned"]} == {(31, 32)}
    weights = graph.model.graph.initializers
    assert (weights["w"].const_value.numpy()[:, 31] == 128).all()


def test_a_body_of_its_own_is_not_cut_off(fill, context):
    """What reads the logits behind a Softmax could be a product in a branch."""
    graph = fill(
        """g (float[N,16] x, bool c) => (float[N,31] y) <float[16,31] w> {
        h = MatMul(x, w)  s = Softmax<axis = 1>(h)
        y = If (c) <then_branch = t () => (float[N,31] p) { p = Relu(s) },
            else_branch = e () => (float[N,31] q) { q = Neg(s) }> }"""
    )
    result = Align(waste=1)(graph, context(graph))
    assert not result.modified
    assert any("Softmax runs over it" in refusal.reason for refusal in result.refusals)


def test_old_opsets_slice_by_attributes(fill, context):
    graph = fill(
        '<ir_version: 5, opset_import: ["": 9]> '
        "g (float[N,16] x) => (float[N,31] y) <float[16,31] w> { y = MatMul(x, w) }"
    )
    result = aligned(graph, context)
    assert result.changes["slices at outputs"] == 1
    (node,) = (node for node in graph.nodes() if node.op_type == "Slice")
    assert len(node.inputs) == 1
