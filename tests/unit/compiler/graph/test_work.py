from __future__ import annotations

import pytest

from enginesmith.compiler.graph.selection import label
from enginesmith.compiler.graph.work import Workload, is_weighted, precision


def work(graph, *names, sizes=None, shapes=None):
    """The work of the nodes of these names as one kernel; of all nodes where there are none."""
    load = Workload(graph, {"N": 2} if sizes is None else sizes, shapes)
    return load.of([node for node in load.nodes() if not names or label(node) in names])


@pytest.mark.parametrize(
    ("text", "flops", "weights", "moved"),
    [
        ("g (float[N,4,8,8] x) => (float[N,6,6,6] y) <float[6,2,3,3] w> { y = Conv<group = 2>(x, w) }",
         2 * 2 * 6 * 36 * 18, 4 * 108, 4 * (2 * 256 + 2 * 216)),
        ("g (float[N,4] x) => (float[N,5] y) <float[4,5] w, float[5] b> { y = Gemm(x, w, b) }",
         2 * 2 * 5 * 4, 4 * 25, 4 * 2 * 9),
        ("g (float[N,3,4] x) => (float[N,3,5] y) <float[4,5] w> { y = MatMul(x, w) }",
         2 * 2 * 3 * 5 * 4, 4 * 20, 4 * 2 * 3 * 9),
        ("g (float[7,N,3] x) => (float[7,1,N,5] y) <float[1,20,3] w, float[1,20,5] r> "
         "{ y = LSTM <hidden_size = 5> (x, w, r) }",
         2 * 7 * 2 * 160, 4 * 160, 4 * (7 * 2 * 3 + 7 * 2 * 5)),
        ('<ir_version: 10, opset_import: ["": 23]> g (float[N,2,3,4] q, float[N,2,7,4] k, float[N,2,7,5] v) '
         "=> (float[N,2,3,5] y) { y = Attention(q, k, v) }",
         2 * 2 * 2 * 3 * 7 * 9, 0, 4 * 2 * 2 * (12 + 28 + 35 + 15)),
        ("g (float[N,8] x, float[N,8] z) => (float[N,8] y) { y = Add(x, z) }", 16, 0, 4 * 48),
        ("g (float[N,8] x) => (float[N,8] y) { y = Softmax(x) }", 5 * 16, 0, 4 * 32),
        ("g (float[N,3,8,8] x) => (float[N,3,4,4] y) { y = MaxPool<kernel_shape = [2,2], strides = [2,2]>(x) }",
         4 * 2 * 48, 0, 4 * 2 * (192 + 48)),
        ("g (float[N,8] x) => (float[N,1] y) { y = ReduceMean<axes = [1]>(x) }", 16, 0, 4 * 18),
        ("g (int64[N] i) => (float[N,16] y) <float[1000,16] t> { y = Gather(t, i) }", 0, 4 * 32, 2 * 8 + 4 * 32),
        ("g (float[N,8] x) => (float16[N,8] y) { y = Cast<to = 10>(x) }", 0, 0, 16 * 6),
        ("g (float[N,8] x) => (float[8,N] y) { y = Transpose(x) }", 0, 0, 4 * 32),
        ("g (float[N,8] x) => (float[N,2,4] y) <int64[3] s = {0, 2, 4}> { y = Reshape(x, s) }", 0, 0, 0),
        ("g (float[N,8] x) => (uint8[N,8] y) <float s = {0.1}, uint8 z = {0}> { y = QuantizeLinear(x, s, z) }",
         2 * 16, 5, 16 * 5),
    ],
)  # fmt: skip
def test_operations_and_bytes(fill, text, flops, weights, moved):
    found = work(fill(text))
    assert (found.flops, found.weight_bytes, found.moved_bytes) == (flops, weights, moved)
    assert found.known
    assert found.bytes == weights + moved


CHAIN = """g (float[N,4] x) => (float[N,8] y) <float[4,8] w> {
    [product] a = MatMul(x, w)  [relu] b = Relu(a)  [exp] c = Exp(b)  [add] y = Add(b, c) }"""


def test_what_stays_within_a_kernel_is_not_moved(fill):
    graph = fill(CHAIN)
    apart = work(graph, "product").moved_bytes + work(graph, "relu").moved_bytes
    fused = work(graph, "product", "relu")
    assert fused.moved_bytes == 4 * 2 * (4 + 8)
    assert apart - fused.moved_bytes == 4 * 2 * 16, "what the product gives is neither written nor read"
    assert fused.flops == 2 * 64 + 16
    assert fused.heavy == 2 * 64
    assert work(graph, "relu", "exp").moved_bytes == 4 * 2 * 24, "what leaves is written, once"
    assert work(graph, "exp", "add").moved_bytes == 4 * 2 * 16, "what two nodes read is read once"


QUANTIZED = """g (float[N,4] x) => (float[N,8] y)
<float s = {0.1}, uint8 z = {128}, float t = {0.01}, int8 v = {0}, int8[4,8] w = {%s}> {
    [q] xq = QuantizeLinear(x, s, z)  [dx] xd = DequantizeLinear(xq, s, z)  [dw] wd = DequantizeLinear(w, t, v)
    [product] y = MatMul(xd, wd) }""" % ", ".join(["1"] * 32)  # fmt: skip  # noqa: UP031


def test_a_product_between_quantizers_is_in_8_bits_and_reads_bytes(read):
    graph = read(QUANTIZED)
    found = work(graph, "dx", "dw", "product")
    assert found.precision == "int8"
    assert found.moved_bytes == 2 * 4 + 4 * 2 * 8
    assert found.weight_bytes == 32 + 4 + 1 + 4 + 1
    assert found.flops == 2 * 64 + 2 * 8, "the weights are dequantized when the engine is built"
    assert work(graph, "product").precision == "int8"
    assert work(graph, "q").precision == "fp32"


def test_precisions_and_weights(read, fill):
    half = read("g (float16[N,4] x) => (float16[N,4] y) { y = Relu(x) }")
    (node,) = half.nodes()
    assert precision(node) == "fp16"
    lstm = """g (float[7,N,3] x) => (float[7,1,N,5] y)
        <int8[1,3,20] w = {W}, int8[1,5,20] r = {R}, float[1,20] s, float[1,20] t,
         int8[1,20] z = {Z}, int8[1,20] o = {Z}> {
        y = com.microsoft.DynamicQuantizeLSTM<hidden_size = 5>(x, w, r, "", "", "", "", "", s, z, t, o) }"""
    for name, count in (("W", 60), ("R", 100), ("Z", 20)):
        lstm = lstm.replace(f"{{{name}}}", "{" + ",".join(["1"] * count) + "}")
    (dynamic,) = Workload(fill(lstm), {"N": 2}).nodes()
    assert precision(dynamic) == "int8"
    product = read("g (float[N,4] x, float[4,4] w) => (float[N,4] y) { y = MatMul(x, w) }")
    assert not any(map(is_weighted, Workload(product, {"N": 1}).nodes()))
    weighted = Workload(fill(CHAIN), {"N": 1})
    assert [is_weighted(node) for node in weighted.nodes()] == [True, False, False, False]
    quantized = Workload(read(QUANTIZED), {"N": 1})
    assert [is_weighted(node) for node in quantized.nodes()] == [False, False, False, True]


def test_shapes_that_only_the_runtime_knows(read):
    text = """g (float[N,4] x) => (float y) { [where] n = NonZero(x)  [cast] f = Cast<to = 1>(n)
        [sum] y = ReduceSum<keepdims = 0>(f) }"""
    assert not work(read(text), "cast").known
    found = work(read(text), "cast", shapes={"n": (2, 5), "f": (2, 5)})
    assert found.known
    assert found.moved_bytes == 10 * 8 + 10 * 4


def test_scaled():
    from enginesmith.compiler.graph.work import Work

    half = Work(8.0, 4.0, 2.0, "fp32", 6.0).scaled(flops=0.5, weights=0.25, moved=2, precision="int8")
    assert half == Work(4.0, 1.0, 4.0, "int8", 3.0)
