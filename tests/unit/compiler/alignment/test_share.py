from __future__ import annotations

import pytest

from enginesmith.compiler.alignment.share import aligned_share, is_aligned

TWO = """g (float[N,64] x) => (float[N,40] y) <float[64,120] w, float[120,40] v> {
    [first] h = MatMul(x, w)  [second] y = MatMul(h, v) }"""


def test_the_share_is_of_multiply_adds(fill):
    graph = fill(TWO)
    assert aligned_share(graph, 8) == 1
    assert aligned_share(graph, 16) == 0
    assert aligned_share(graph, 120) == 0
    graph = fill(TWO.replace("40", "41"))
    assert aligned_share(graph, 8, {"N": 5}) == pytest.approx(64 / (64 + 41))


def test_a_graph_without_products_is_aligned(fill):
    assert aligned_share(fill("g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }"), 8) == 1


@pytest.mark.parametrize(
    ("text", "aligned"),
    [
        ("g (float[N,8] x) => (float[N,16] y) <float[16,8] w> { y = Gemm<transB = 1>(x, w) }", True),
        ("g (float[N,9] x) => (float[N,16] y) <float[16,9] w> { y = Gemm<transB = 1>(x, w) }", False),
        ("g (float[N,16,8,8] x) => (float[N,16,8,8] y) <float[16,8,1,1] w> { y = Conv<group = 2>(x, w) }", True),
        ("g (float[N,16,8,8] x) => (float[N,16,8,8] y) <float[16,1,1,1] w> { y = Conv<group = 16>(x, w) }", False),
        ("g (float[N,8,8,8] x) => (float[N,12,8,8] y) <float[8,12,1,1] w> { y = ConvTranspose(x, w) }", False),
        ("g (float[N,S,8] x, float[N,8,T] z) => (float[N,S,T] y) { y = MatMul(x, z) }", True),
        ("g (float[5,N,8] x) => (float[5,1,N,13] y) <float[1,52,8] w, float[1,52,13] r> "
         "{ y = LSTM<hidden_size = 13>(x, w, r) }", False),
        ('<ir_version: 10, opset_import: ["": 23]> g (float[N,2,5,16] q, float[N,2,7,16] k, float[N,2,7,8] v) '
         "=> (float[N,2,5,8] y) { y = Attention(q, k, v) }", True),
        ('<ir_version: 10, opset_import: ["": 23]> g (float[N,5,24] q, float[N,7,24] k, float[N,7,24] v) '
         "=> (float[N,5,24] y) { y = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v) }", False),
        ("g (float[N,8] x) => (float[N,8] y) { y = Relu(x) }", False),
    ],
)  # fmt: skip
def test_products(fill, text, aligned):
    (node,) = fill(text).nodes()
    assert is_aligned(node, 8) is aligned
