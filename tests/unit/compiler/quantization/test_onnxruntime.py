"""What is placed where; that ONNX Runtime fuses it is tested with the pass."""

from __future__ import annotations

import pytest

from enginesmith.compiler.quantization.onnxruntime import plan

RESIDUAL = """
g (float[N,4,8,8] x, float[4,4,3,3] w1, float[4] b1, float[4,4,3,3] w2, float[4,10] w3, float[10] b3)
=> (float[N,10] y)
{
  c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
  r1 = Relu(c1)
  p1 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r1)
  c2 = Conv<pads=[1,1,1,1]>(p1, w2)
  s = Add(c2, p1)
  r2 = Relu(s)
  a = GlobalAveragePool(r2)
  f = Flatten(a)
  y = Gemm(f, w3, b3)
}
"""


def reads(found) -> dict[str, list[str]]:
    """For each activation the uses that read Q/DQ, as ``result of the reader: which input``."""
    return {name: sorted(_text(use) for use in uses) for name, uses in found.activations.items()}


def _text(use) -> str:
    return f"output:{use.place}" if use.node is None else f"{use.node.outputs[0].name}:{use.place}"


def refused(found) -> dict[str, str]:
    return {refusal.node: refusal.reason for refusal in found.refusals}


def results(found) -> set[str]:
    return {node.outputs[0].name for node in found.nodes}


def test_a_residual_network_is_quantized_end_to_end(weighted):
    found = plan(weighted(RESIDUAL))
    assert reads(found) == {
        "x": ["c1:0"],
        "r1": ["p1:0"],
        "p1": ["c2:0", "s:1"],
        "c2": ["s:0"],
        "r2": ["a:0"],
        "a": ["f:0"],
        "f": ["y:0"],
    }
    assert results(found) == {"c1", "p1", "c2", "s", "a", "f", "y"}
    assert set(found.groups) == {frozenset(("r1", "p1")), frozenset(("a", "f"))}
    assert {weight.value.name: weight.axis for weight in found.weights} == {"w1": 0, "w2": 0, "w3": 1}
    assert {bias.value.name: (bias.input, bias.weight.value.name) for bias in found.biases} == {
        "b1": ("x", "w1"),
        "b3": ("f", "w3"),
    }
    assert found.refusals == ()


def test_one_scale_for_a_weight_by_choice(weighted):
    assert {weight.axis for weight in plan(weighted(RESIDUAL), per_channel=False).weights} == {None}


def test_the_result_of_a_conv_is_integer_for_float_readers_too(weighted):
    graph = weighted("g (float[N,4,8,8] x, float[4,4,1,1] w) => (float[N,4,8,8] c, float[N,4,8,8] y) "
                     "{ c = Conv(x, w) y = Erf(c) }")  # fmt: skip
    assert reads(plan(graph)) == {"x": ["c:0"], "c": ["output:0", "y:0"]}


def test_a_product_that_floats_read_stays_float(weighted):
    text = "g (float[N,4] x, float[4,4] w) => (float[N,4] y) { h = Gemm(x, w) y = Erf(h) }"
    assert reads(plan(weighted(text))) == {"x": ["h:0"]}


def test_a_product_that_integers_read_is_integer_for_all(weighted):
    graph = weighted("g (float[N,4] x, float[4,4] w, float[4,4] v) => (float[N,4] y, float[N,4] z) "
                     "{ h = Gemm(x, w) r = Relu(h) y = Gemm(r, v) z = Erf(r) }")  # fmt: skip
    assert reads(plan(graph)) == {"x": ["h:0"], "r": ["y:0", "z:0"]}


@pytest.mark.parametrize(
    ("follower", "vanishes"),
    [
        ("Relu(c)", True),
        ("Clip(c, zero, six)", True),
        ("Clip(c, zero)", True),
        ("Clip(c, minus, six)", False),
        ("Clip(c)", False),
        ("LeakyRelu(c)", False),
    ],
)
def test_a_relu_vanishes_in_the_range_of_the_result(read, weighted, follower, vanishes):
    text = f"""g (float[N,4,8,8] x, float[4,4,1,1] w, float[4,4,1,1] v) => (float[N,4,8,8] y)
        <float zero = {{0}}, float six = {{6}}, float minus = {{-1}}>
        {{ c = Conv(x, w) r = {follower} y = Conv(r, v) }}"""
    assert ("c" not in plan(weighted(text)).activations) == vanishes


def test_a_relu_of_a_value_with_other_readers_does_not_vanish(weighted):
    text = """g (float[N,4,8,8] x, float[4,4,1,1] w, float[4,4,1,1] v) => (float[N,4,8,8] y, float[N,4,8,8] z)
        { c = Conv(x, w) r = Relu(c) y = Conv(r, v) z = Conv(c, v) }"""
    assert reads(plan(weighted(text)))["c"] == ["r:0", "z:0"]


@pytest.mark.parametrize(
    "between",
    [
        "s = Add(a, x)",  # a residual that comes as floats
        "s = Erf(a)",
        "s = Mul(a, scale)",
        "s = Mul(a, a)",
        "e = Erf(a) s = Sigmoid(e)",
    ],
)
def test_light_nodes_beside_floats_stay_float(weighted, between):
    text = f"""g (float[N,4] x, float[4,4] w, float[4,4] v) => (float[N,4] y) <float scale = {{2}}>
        {{ a = Gemm(x, w) {between} y = Gemm(s, v) }}"""
    assert results(plan(weighted(text))) == {"a", "y"}


def test_light_nodes_at_the_end_stay_float(weighted):
    text = "g (float[N,4,8,8] x, float[4,4,1,1] w) => (float[N,4] y) { c = Conv(x, w) p = GlobalAveragePool(c) " \
           "f = Flatten(p) y = Softmax(f) }"  # fmt: skip
    assert results(plan(weighted(text))) == {"c"}


def test_gates_are_integer_between_convolutions(weighted):
    text = """g (float[N,4,8,8] x, float[4,4,1,1] w, float[4,4,1,1] v) => (float[N,4,8,8] y)
        { c = Conv(x, w) s = Sigmoid(c) m = Mul(c, s) y = Conv(m, v) }"""
    assert results(plan(weighted(text))) == {"c", "s", "m", "y"}


def test_what_goes_to_a_concat_alone_takes_its_range(weighted):
    text = """g (float[N,4,8,8] x, float[4,4,1,1] w, float[4,8,1,1] v) => (float[N,4,8,8] y)
        { a = Conv(x, w) b = Conv(x, w) c = Conv(a, w) j = Concat<axis=1>(a, c) y = Conv(j, v) }"""
    found = plan(weighted(text))
    assert found.groups == (frozenset(("c", "j")),)  # a is read by a Conv too


def test_data_is_moved_as_bytes_before_integers(weighted):
    text = (
        """g (float[N,8,4] x, float[4,4,1] w) => (float[N,4,8] y) { t = Transpose<perm=[0,2,1]>(x) y = Conv(t, w) }"""
    )
    found = plan(weighted(text))
    assert reads(found) == {"x": ["t:0"], "t": ["y:0"], "y": ["output:0"]}
    assert found.groups == (frozenset("xt"),)


def test_data_that_floats_read_too_is_moved_as_floats(weighted):
    text = """g (float[N,8,4] x, float[4,4,1] w) => (float[N,4,8] y, float[N,4,8] z)
        { t = Transpose<perm=[0,2,1]>(x) y = Conv(t, w) z = Erf(t) }"""
    assert "x" not in plan(weighted(text)).activations


def test_integers_are_moved_as_bytes_whoever_reads_them(weighted):
    text = """g (float[N,4,8] x, float[4,4,1] w) => (float[N,32] y)
        { c = Conv(x, w) t = Transpose<perm=[0,2,1]>(c) f = Flatten(t) y = Erf(f) }"""
    found = plan(weighted(text))
    assert results(found) == {"c", "t", "f"}
    assert found.groups == (frozenset("ctf"),)


def test_the_result_of_a_product_is_moved_as_it_is_read(weighted):
    text = """g (float[N,4] x, float[4,4] w, float[4,4] v) => (float[N,2,2] y)
        { h = Gemm(x, w) u = Unsqueeze(h, one) t = Squeeze(u, one) MOVED }"""
    text = text.replace("=> (float[N,2,2] y)", "=> (float[N,4] y) <int64[1] one = {1}>")
    assert results(plan(weighted(text.replace("MOVED", "y = Erf(t)")))) == {"h"}
    assert results(plan(weighted(text.replace("MOVED", "y = Gemm(t, v)")))) == {"h", "u", "t", "y"}


def test_max_pooling_of_bytes_needs_opset_12(weighted):
    header = '<ir_version: 8, opset_import: ["": 11]>\n'
    assert "p1" not in results(plan(weighted(header + RESIDUAL), per_channel=False))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("g (float[N,4,4] x, float[4,4] w) => (float[N,4,4] y) { y = MatMul(x, x) }", "both operands are activations"),
        (
            "g (float[4,4] x, float[4,4] w) => (float[4,4] y) { y = MatMul(w, x) }",
            "MatMul reads its weight as input 0",
        ),
        (
            "g (float[3,4,4] x, float[3,4,4] w) => (float[3,4,4] y) { y = MatMul(x, w) }",
            "its weight has 3 dimensions, not 2",
        ),
        (
            "g (float[4,N] x, float[4,4] w) => (float[N,4] y) { y = Gemm<transA=1>(x, w) }",
            "its first operand is transposed",
        ),
        (
            "g (float[N,4] x, float[4,4] w, float[1] b) => (float[N,4] y) { y = Gemm(x, w, b) }",
            "its bias has the shape [1], not [4]",
        ),
        (
            "g (float[N,4] x, float[4,4] w, float[4] b) => (float[N,4] y) { y = Gemm<beta=2.0>(x, w, b) }",
            "its bias has a factor (beta)",
        ),
        (
            "g (float[4,4] x, float[4,4] w) => (float[4,4] y) { h = Neg(x) y = Gemm(x, w, h) }",
            "its bias is no constant",
        ),
        (
            "g (float[N,4,8,8] x, float[4,4,2,2] w) => (float[N,4,9,9] y) { y = ConvTranspose(x, w) }",
            "ONNX Runtime has no int8 kernel for ConvTranspose",
        ),
        (
            "g (float[S,N,4] x, float[1,8,4] w, float[1,8,2] r) => (float[S,1,N,2] y) "
            "{ y = LSTM<hidden_size=2>(x, w, r) }",
            "ONNX Runtime has no static int8 kernel for LSTM: use quantize-dynamic",
        ),
    ],
)
def test_what_has_no_integer_kernel_is_refused(weighted, text, reason):
    found = plan(weighted(text))
    assert refused(found) == {"y": reason}
    assert not found.nodes
    assert not found.activations


def test_branches_stay_float(weighted):
    text = """g (float[N,4] x, float[4,4] w) => (float[N,4] y) <bool c = {1}> { y = If(c) <
        then_branch = t () => (float[N,4] a) { a = MatMul(x, w) },
        else_branch = e () => (float[N,4] b) { b = Neg(x) }> }"""
    found = plan(weighted(text))
    assert refused(found) == {"y": "the bodies of If stay float"}
    assert not found.nodes


def test_nodes_are_kept_with_their_reason(weighted):
    graph = weighted(RESIDUAL)
    kept = [node for node in graph.nodes() if node.op_type in ("Gemm", "MaxPool")]
    found = plan(graph, keep=dict.fromkeys(kept, "so"))
    assert refused(found) == {"y": "so", "p1": "so"}
    assert results(found) == {"c1", "c2"}
