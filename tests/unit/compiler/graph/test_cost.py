from __future__ import annotations

import pytest

from enginesmith.compiler.graph.cost import Cost, costs, share


@pytest.mark.parametrize(
    ("text", "macs"),
    [
        ("g (float[N,3,4] x, float[4,5] w) => (float[N,3,5] y) { y = MatMul(x, w) }", 2 * 3 * 5 * 4),
        ("g (float[4,N] x, float[5,4] w) => (float[N,5] y) { y = Gemm<transA = 1, transB = 1>(x, w) }", 2 * 5 * 4),
        ("g (float[N,4,8,8] x, float[6,2,3,3] w) => (float[N,6,6,6] y) { y = Conv<group = 2>(x, w) }", 2 * 6 * 36 * 18),
        ("g (float[N,4,8,8] x, float[4,3,2,2] w) => (float[N,3,9,9] y) { y = ConvTranspose(x, w) }", 2 * 4 * 64 * 12),
        ("g (float[7,N,3] x, float[1,20,3] w, float[1,20,5] r) => (float[7,1,N,5] y) "
         "{ y = LSTM <hidden_size = 5> (x, w, r) }", 7 * 2 * (60 + 100)),
        ("g (float[N,3,4] x, float[N,4,5] w) => (float[N,3,5] y) "
         '{ y = Einsum<equation = "bij, bjk -> bik">(x, w) }', 2 * 3 * 4 * 5),
        ('<ir_version: 10, opset_import: ["": 23]> g (float[N,2,3,4] q, float[N,2,7,4] k, float[N,2,7,5] v) '
         "=> (float[N,2,3,5] y) { y = Attention(q, k, v) }", 2 * 2 * 3 * 7 * 9),
        ('<ir_version: 10, opset_import: ["": 23]> g (float[N,3,8] q, float[N,7,4] k, float[N,7,4] v) '
         "=> (float[N,3,8] y) { y = Attention<q_num_heads = 2, kv_num_heads = 1>(q, k, v) }", 2 * 3 * 7 * 16),
        ("g (float[N] x) => (float[N] y) { y = Neg(x) }", 0),
        ("g (uint8[N,3,4] x, int8[4,5] w) => (int32[N,3,5] y) { y = MatMulInteger(x, w) }", 2 * 3 * 5 * 4),
        ("g (uint8[N,4,8,8] x, int8[6,4,3,3] w) => (int32[N,6,6,6] y) { y = ConvInteger(x, w) }", 2 * 6 * 36 * 36),
        ("g (uint8[N,4,8,8] x, float s, uint8 z, int8[6,4,3,3] w, float t, int8 v, float u, uint8 o) "
         "=> (uint8[N,6,6,6] y) { y = QLinearConv(x, s, z, w, t, v, u, o) }", 2 * 6 * 36 * 36),
        ("g (float[N,3,4] x, float[4,5] w) => (float[N,3,5] y) { y = com.microsoft.FusedMatMul(x, w) }", 2 * 3 * 5 * 4),
        ("g (float[N,3,64] x, uint8[5,2,16] w, float[10] s) => (float[N,3,5] y) "
         "{ y = com.microsoft.MatMulNBits<K = 64, N = 5, bits = 4, block_size = 32>(x, w, s) }", 2 * 3 * 5 * 64),
        ("g (float[N,7,8] x, float[8,24] w, float[24] b) => (float[N,7,8] y) "
         "{ y = com.microsoft.Attention<num_heads = 2>(x, w, b) }", 2 * 7 * (8 * 24 + 2 * 7 * 8)),
        ("g (float[N] x) => (float[N] y) { y = local.MatMul(x) }", 0),
    ],
)  # fmt: skip
def test_multiply_adds(read, text, macs):
    assert [cost.macs for cost in costs(read(text), {"N": 2}).values()] == [macs]


def test_shapes_inside_follow_the_sizes(read):
    text = """g (float[N,4] x) => (float[N,4] y) <float[4,4] w = {1,2,3,4,1,2,3,4,1,2,3,4,1,2,3,4}> {
        [first] a = MatMul(x, w)  [relu] b = Relu(a)  [second] y = MatMul(b, w) }"""
    found = costs(read(text), {"N": 3})
    assert found == {"first": Cost(48, 64), "relu": Cost(0, 0), "second": Cost(48, 64)}
    assert share(found, ["first", "relu", "unknown"]) == 0.5


def test_unknown_shapes_count_nothing(read):
    text = """g (float[N,4] x, float[N,4] z) => (float y) {
        n = NonZero(x)  f = Cast<to = 1>(n)  t = Transpose(f)  [product] m = MatMul(f, t)
        y = ReduceSum<keepdims = 0>(m) }"""
    assert costs(read(text), {"N": 3})["product"].macs == 0


def test_bytes_where_nothing_multiplies(read):
    text = (
        "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}, float v = {1}> { [a] b = Add(x, w)  [m] y = Mul(b, v) }"
    )
    assert share(costs(read(text), {}), ["a"]) == pytest.approx(8 / 12)
    assert share({}, []) == 0
