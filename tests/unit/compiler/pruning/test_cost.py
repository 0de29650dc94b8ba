import pytest

from enginesmith.compiler.dimensions import Dimensions
from enginesmith.compiler.graph.cost import costs
from enginesmith.compiler.graph.editing import flattened
from enginesmith.compiler.pruning.cost import Macs


@pytest.mark.parametrize(
    ("text", "sizes", "expected"),
    [
        (
            """g (float[N,3,8,8] x) => (float[N,4,8,8] y) <float[16,3,1,1] a, float[4,16,3,3] b> {
            [a] h = Conv(x, a)  [b] y = Conv<pads = [1,1,1,1]>(h, b) }""",
            {"a": 8},
            2 * 64 * (8 * 3 + 4 * 8 * 9),
        ),
        (
            """g (float[N,3,8,8] x) => (float[N,1,8,8] y)
            <float[16,3,1,1] a, float[16,1,3,3] b, float[1,16,1,1] c> {
            [a] h = Conv(x, a)  [b] i = Conv<group = 16, pads = [1,1,1,1]>(h, b)  [c] y = Conv(i, c) }""",
            {"a": 4},
            2 * 64 * (4 * 3 + 4 * 9 + 4),
        ),
        (
            """g (float[N,16] x) => (float[N,1] y) <float[16,32] a, float[1,32] b> {
            [a] h = MatMul(x, a)  [b] y = Gemm<transB = 1>(h, b) }""",
            {"a": 10},
            2 * (16 * 10 + 10),
        ),
        (
            """g (float[N,3,4,4] x) => (float[N,5,8,8] y) <float[16,3,1,1] a, float[16,5,2,2] b> {
            [a] h = Conv(x, a)  [b] y = ConvTranspose<strides = [2,2]>(h, b) }""",
            {"a": 8},
            2 * 16 * (8 * 3 + 8 * 5 * 4),
        ),
        (
            """g (float[5,N,8] x) => (float[5,N,4] y) <float[1,64,8] w, float[1,64,16] r, float[16,4] v> {
            [rnn] h = LSTM<hidden_size = 16>(x, w, r)  a = Constant<value_ints = [1]>()  q = Squeeze(h, a)
            [head] y = MatMul(q, v) }""",
            {"rnn": 8},
            5 * 2 * (32 * 8 + 32 * 8 + 8 * 4),
        ),
        (
            """g (float[N,6,16] x) => (float[N,6,5] y) <float[16,16] q, float[16,16] k, float[16,16] v, float[16,5] o> {
            [q] q0 = MatMul(x, q)  [k] k0 = MatMul(x, k)  [v] v0 = MatMul(x, v)  s = Constant<value_ints = [0,6,4,4]>()
            q1 = Reshape(q0, s)  k1 = Reshape(k0, s)  v1 = Reshape(v0, s)  q2 = Transpose<perm = [0,2,1,3]>(q1)
            k2 = Transpose<perm = [0,2,3,1]>(k1)  v2 = Transpose<perm = [0,2,1,3]>(v1)  a = MatMul(q2, k2)
            p = Softmax(a)  m = MatMul(p, v2)  m1 = Transpose<perm = [0,2,1,3]>(m)
            t = Constant<value_ints = [0,6,-1]>()  m2 = Reshape(m1, t)  [o] y = MatMul(m2, o) }""",
            {"q": 3},
            2 * 6 * (3 * 16 * 12 + 2 * 3 * 6 * 4 + 12 * 5),
        ),
    ],
    ids=["conv", "depthwise", "linear", "transposed", "lstm", "attention"],
)
def test_multiply_adds_at_other_sizes(fill, text, sizes, expected):
    graph = flattened(fill(text))
    dimensions = Dimensions(graph)
    macs = Macs(dimensions, costs(graph, {"N": 2}))
    dims = {g.name.partition("#")[0]: g.dim for g in reversed(dimensions.groups) if not g.why_not("shrink")}
    chosen = {dims[name]: size for name, size in sizes.items()}
    assert macs.total({}) == sum(cost.macs for cost in costs(graph, {"N": 2}).values())
    assert macs.total(chosen) == pytest.approx(expected)
    whole = {dim: dim.size for dim in dims.values()}
    saved = sum(macs.touched(dim, whole) - macs.touched(dim, {**whole, dim: size}) for dim, size in chosen.items())
    assert saved == pytest.approx(macs.total({}) - expected)


def test_a_graph_without_products_costs_nothing(read):
    graph = flattened(read("g (float[N,16] x) => (float[N,16] y) { y = Relu(x) }"))
    assert Macs(Dimensions(graph), costs(graph, {"N": 2})).total({}) == 0
