from __future__ import annotations

import onnx_ir as ir
import pytest

from enginesmith.compiler.graph import Graph, probe
from enginesmith.passes.base import PassResult, Refusal
from enginesmith.passes.fuse_transformer import FuseTransformer
from enginesmith.passes.opset import Opset

CPU, CUDA = FuseTransformer(scheme="onnxruntime-cpu"), FuseTransformer(scheme="onnxruntime-cuda")
ONNX, TENSORRT = FuseTransformer(scheme="onnx"), FuseTransformer(scheme="tensorrt")

ATTENTION = """<ir_version: 8, opset_import: ["": 17]>
g (float[B,S,8] x, float[B,1,1,S] row, float[B,1,S,S] mask, float[S,S] flat, bool[B,1,S,S] allowed) => (float[B,S,8] y)
    <float[8,8] wq, float[8] bq, float[8,8] wk, float[8] bk, float[8,8] wv, float[8] bv,
     int64[4] split = {0, 0, 2, 4}, int64[3] join = {0, 0, 8}, int64[2] flatten = {-1, 8}, int64[2] fold = {0, -1},
     float half = {0.5}, float third = {0.3}, float zero = {0}, float lowest = {-3.4e38},
     float infinite = {-inf}> {
    a = MatMul(x, wq)  qa = Add(a, bq)  qs = Reshape(qa, split)  q = Transpose <perm = [0, 2, 1, 3]> (qs)
    b = MatMul(x, wk)  kb = Add(b, bk)  ks = Reshape(kb, split)  k = Transpose <perm = [0, 2, 3, 1]> (ks)
    c = MatMul(x, wv)  vc = Add(c, bv)  vs = Reshape(vc, split)  v = Transpose <perm = [0, 2, 1, 3]> (vs)
    SCORES
    [softmax] p = Softmax <axis = -1> (s)
    PROBABILITIES  t = Transpose <perm = [0, 2, 1, 3]> (o)
    END
}"""
PARTS = {
    "SCORES": "m = MatMul(q, k)  s = Mul(m, half)",
    "PROBABILITIES": "o = MatMul(p, v)",
    "END": "y = Reshape(t, join)",
}


KEYS = "h = Transpose <perm = [0, 2, 1, 3]> (ks)  l = Transpose <perm = [0, 1, 3, 2]> (h)  "
ROTATED = "u = Neg(q)  h = Transpose <perm = [0, 2, 1, 3]> (ks)  n = Neg(h)  l = Transpose <perm = [0, 1, 3, 2]> (n)  "
GUARD = "i = IsNaN(p)  r = Where(i, zero, p)  o = MatMul(r, v)"


def attention(**parts: str) -> str:
    text = ATTENTION
    for name, default in PARTS.items():
        text = text.replace(name, parts.get(name.lower(), default))
    return text


def node_of(graph: Graph, operator: str) -> ir.Node:
    return next(node for node in graph.nodes() if node.op_type == operator)


@pytest.mark.parametrize(
    ("scores", "scale", "bias"),
    [
        ("m = MatMul(q, k)  s = Mul(m, half)", 0.5, None),
        ("m = MatMul(q, k)  s = Div(m, half)", 2.0, None),
        ("u = Mul(q, half)  w = Mul(k, third)  s = MatMul(u, w)", 0.15, None),
        ("m = MatMul(q, k)  n = Mul(m, half)  s = Add(n, mask)", 0.5, "mask"),
        ("m = MatMul(q, k)  n = Mul(half, m)  s = Add(mask, n)", 0.5, "mask"),
        ("m = MatMul(q, k)  n = Mul(half, m)  d = Add(flat, n)  s = Add(d, mask)", 0.5, "Add"),
        ("m = MatMul(q, k)  n = Mul(m, half)  s = Add(n, row)", 0.5, "Expand"),
        ("m = MatMul(q, k)  s = Where(allowed, m, lowest)", 1.0, "Where"),
        ("m = MatMul(q, k)  s = Where(allowed, lowest, m)", 1.0, "Where"),
        (KEYS + "s = MatMul(q, l)", 1.0, None),
    ],
)
def test_attention_with_its_scale_and_masks(fused, scores, scale, bias):
    graph, result = fused(CPU, attention(scores=scores))
    assert result.changes == {"attention fused": 1}
    assert result.details["relative_l2"] < 1e-6
    node = node_of(graph, "MultiHeadAttention")
    assert node.attributes["num_heads"].value == 2
    assert node.attributes["scale"].value == pytest.approx(scale)
    given = node.inputs[5] if len(node.inputs) > 5 else None
    made_by = given.producer() if given is not None else None
    assert (made_by.op_type if made_by is not None else given and given.name) == bias
    assert {"Softmax", "Reshape", "Transpose"}.isdisjoint(graph.operators())


def test_attention_whose_keys_and_values_are_split_already(fused):
    text = attention(scores=ROTATED + "s = MatMul(u, l)", probabilities="e = Neg(v)  o = MatMul(p, e)")
    graph, result = fused(CPU, text)
    assert result.changes == {"attention fused": 1}
    node = node_of(graph, "MultiHeadAttention")
    assert [value.name for value in node.inputs[1:]] == ["n", "e"]


def test_attention_whose_keys_are_computed_with_when_transposed(fused):
    graph, result = fused(CPU, attention(scores="n = Neg(k)  s = MatMul(q, n)"))
    assert result.changes == {"attention fused": 1}
    assert "Softmax" not in graph.operators()


def test_attention_whose_operands_are_split_together(fused):
    graph, result = fused(
        CPU,
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[B,S,8] x) => (float[B,S,8] y) <float[8,24] w, float[24] b, int64[5] five = {0, 0, 3, 2, 4},
            int64[3] join = {0, 0, 8}, int64 n0 = {0}, int64 n1 = {1}, int64 n2 = {2}> {
            c = MatMul(x, w)  d = Add(c, b)  e = Reshape(d, five)  f = Transpose <perm = [2, 0, 3, 1, 4]> (e)
            q = Gather(f, n0)  h = Gather(f, n1)  v = Gather(f, n2)  k = Transpose <perm = [0, 1, 3, 2]> (h)
            s = MatMul(q, k)  p = Softmax <axis = -1> (s)  o = MatMul(p, v)
            t = Transpose <perm = [0, 2, 1, 3]> (o)  y = Reshape(t, join) }""",
    )
    assert result.changes == {"attention fused": 1}
    node = node_of(graph, "MultiHeadAttention")
    assert [value.name for value in node.inputs[1:]] == ["h", "v"]


@pytest.mark.parametrize("choice", ["Where(allowed, zero, infinite)", "Where(allowed, infinite, zero)"])
def test_rows_that_are_masked_whole_stay_zero(fused, made, choice):
    scores = f"m = MatMul(q, k)  w = {choice}  s = Add(m, w)"
    graph, result = fused(CPU, attention(scores=scores, probabilities=GUARD))
    assert result.changes == {"attention fused": 1}
    inputs = made(graph)
    inputs["allowed"][0, 0, 2] = "infinite, zero" in choice
    output = probe.run(graph, inputs)["y"]
    assert not output[0, 2].any()
    assert output[0, 1].any() or output[0, 3].any()


def test_guard_of_a_finite_mask_is_dropped(fused):
    graph, _ = fused(CPU, attention(scores="m = MatMul(q, k)  s = Where(allowed, m, lowest)", probabilities=GUARD))
    assert {"IsNaN", "ReduceMax"}.isdisjoint(graph.operators())


@pytest.mark.parametrize("end", ["y = Reshape(t, flatten)", "n = Reshape(t, flatten)  y = Neg(n)"])
def test_result_that_loses_its_batch_is_reshaped_still(fused, end):
    graph, result = fused(CPU, attention(end=end).replace("float[B,S,8] y)", "float[N,8] y)"))
    assert result.changes == {"attention fused": 1}
    assert graph.operators()["Reshape"] == 1


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"scores": "m = MatMul(q, k)  n = Add(m, mask)  s = Mul(n, half)"}, "mask is scaled together with the scores"),
        ({"scores": "m = MatMul(q, k)  s = Where(allowed, m, third)"}, "something else than minus infinity"),
        ({"scores": "m = MatMul(q, k)  n = MatMul(q, k)  s = Add(m, n)"}, "a mask cannot be told from its scores"),
        ({"scores": "m = MatMul(q, k)  s = Relu(m)"}, "its scores are no product of queries and keys"),
        (
            {"scores": "m = MatMul(q, k)  s = Mul(m, half)", "probabilities": "r = Relu(p)  o = MatMul(r, v)"},
            "its probabilities go elsewhere",
        ),
        ({"probabilities": "i = Relu(p)  o = MatMul(p, v)  z = MatMul(i, v)"}, "its probabilities go elsewhere"),
        (
            {
                "scores": "m = MatMul(q, k)  w = Where(allowed, half, infinite)  s = Add(m, w)",
                "probabilities": GUARD,
            },
            "rows that are masked whole become zero",
        ),
        ({"end": "y = Reshape(t, join)  z = Reshape(o, join)"}, "its result goes several ways"),
        ({"end": "w = Identity(t)  y = Reshape(w, join)"}, "its heads are not joined by a Reshape"),
        ({"end": "y = Reshape(t, fold)"}, "reshaped to something else"),
    ],
)
def test_refuses_what_is_no_attention(fill, context, parts, reason):
    text = attention(**parts)
    graph = fill(text.replace("float[B,S,8] y)", "float[B,N] y)") if "fold" in parts.get("end", "") else text)
    result = CPU(graph, context(graph))
    assert not result.modified
    assert [refusal.node for refusal in result.refusals] == ["softmax"]
    assert reason in result.refusals[0].reason


FIRST = """<ir_version: 8, opset_import: ["": 17]>
g (float[S,B,8] q, float[S,B,8] k, float[S,B,8] v, float[S,S] flat) => (float[S,B,8] y)
    <int64[3] heads = {0, -1, 4}, int64[3] join = {0, -1, 8}, int64[2] flatten = {-1, 8}> {
    qs = Reshape(q, heads)  a = Transpose <perm = [1, 0, 2]> (qs)
    ks = Reshape(k, heads)  b = Transpose <perm = [1, 2, 0]> (ks)
    vs = Reshape(v, heads)  c = Transpose <perm = [1, 0, 2]> (vs)
    m = MatMul(a, b)  SCORES  p = Softmax <axis = 2> (s)  o = MatMul(p, c)
    t = Transpose <perm = [1, 0, 2]> (o)  END }"""


@pytest.mark.parametrize("end", ["y = Reshape(t, join)", "y = Reshape(t, flatten)"])
def test_attention_with_the_sequence_first_and_heads_beside_the_batch(fused, end):
    text = FIRST.replace("SCORES", "s = Add(m, flat)").replace("END", end)
    text = text.replace("float[S,B,8] y", "float[N,8] y") if "flatten" in end else text
    graph, result = fused(CPU, text)
    assert result.changes == {"attention fused": 1}
    assert node_of(graph, "MultiHeadAttention").attributes["num_heads"].value == 2
    assert graph.operators()["Transpose"] == 4


@pytest.mark.parametrize("rows", ["1", "S"])
def test_a_mask_for_each_head_beside_the_batch_is_unfolded(fused, rows):
    scores = """r = Shape <start = -2> (each)  l = Concat <axis = 0> (less, r)  f = Reshape(each, l)  s = Add(m, f)"""
    text = FIRST.replace("SCORES", scores).replace("END", "y = Reshape(t, join)")
    text = text.replace("float[S,S] flat", f"float[B,2,{rows},S] each").replace(
        "<int64[3]", "<int64[1] less = {-1}, int64[3]"
    )
    graph, result = fused(CPU, text)
    assert result.changes == {"attention fused": 1}
    assert "Softmax" not in graph.operators()


FOLDED = """<ir_version: 8, opset_import: ["": 17]>
g (float[B,S,8] x, float[B,2,1,S] slopes, float[B,1,S,S] mask) => (float[B,S,8] y)
    <int64[4] split = {0, 0, 2, 4}, int64[3] join = {0, 0, 8}, int64[1] two = {2}, int64[1] four = {4},
     int64[1] rest = {-1}, int64[2] row = {1, -1}, float half = {0.5}> {
    h = Reshape(x, split)  q = Transpose <perm = [0, 2, 1, 3]> (h)  n = Neg(q)
    b = Shape <start = 0, end = 1> (x)  l = Shape <start = 1, end = 2> (x)  both = Mul(b, two)
    products = Concat <axis = 0> (both, rest, four)  qf = Reshape(q, products)  nf = Reshape(n, products)
    k = Transpose <perm = [0, 2, 1]> (nf)  m = MatMul(qf, k)  w = Mul(m, half)
    biases = Concat <axis = 0> (both, row)  bias = Reshape(slopes, biases)  a = Add(w, bias)
    opened = Concat <axis = 0> (b, two, l, rest)  o = Reshape(a, opened)  s = Add(o, mask)
    [softmax] p = Softmax <axis = -1> (s)
    folded = Concat <axis = 0> (both, l, rest)  pf = Reshape(p, folded)  v = MatMul(pf, nf)
    ends = Concat <axis = 0> (b, two, l, four)  vo = Reshape(v, ends)
    t = Transpose <perm = [0, 2, 1, 3]> (vo)  y = Reshape(t, join) }"""


@pytest.mark.parametrize("scores", ["s = Add(o, mask)", "s = Mul(o, one)"])
def test_products_with_batch_and_heads_as_one_axis_and_a_bias_for_each_head(fused, scores):
    text = FOLDED.replace("s = Add(o, mask)", scores).replace("float half", "float one = {1}, float half")
    graph, result = fused(CPU, text)
    assert result.changes == {"attention fused": 1}
    node = node_of(graph, "MultiHeadAttention")
    assert node.attributes["num_heads"].value == 2
    assert node.attributes["scale"].value == pytest.approx(0.5)


def test_a_bias_of_three_axes_beside_scores_of_four_is_of_the_heads(fused):
    text = attention(scores="m = MatMul(q, k)  s = Add(m, each)").replace("float[S,S] flat", "float[2,S,S] each")
    graph, result = fused(CPU, text)
    assert result.changes == {"attention fused": 1}
    assert "Softmax" not in graph.operators()


def test_refuses_scores_that_are_scaled_behind_a_bias_for_each_head(fill, context):
    graph = fill(FOLDED.replace("s = Add(o, mask)", "z = Mul(o, half)  s = Add(z, mask)"))
    result = CPU(graph, context(graph))
    assert not result.modified
    assert "its mask is scaled together with the scores" in result.refusals[0].reason


def test_queries_of_another_length_than_keys(fused):
    text = attention().replace("float[B,S,8] x,", "float[B,S,8] x, float[B,7,8] memory,")
    text = text.replace("MatMul(x, wk)", "MatMul(memory, wk)").replace("MatMul(x, wv)", "MatMul(memory, wv)")
    graph, result = fused(CPU, text)
    assert result.changes == {"attention fused": 1}
    node = node_of(graph, "MultiHeadAttention")
    assert [value.shape[1] for value in node.inputs[:3]] == ["S", 7, 7]


def test_refuses_an_attention_whose_probabilities_are_an_output(fill, context):
    text = attention(probabilities="o = MatMul(p, v)").replace("(float[B,S,8] y)", "(float[B,S,8] y, float[B,2,S,S] p)")
    graph = fill(text)
    result = CPU(graph, context(graph))
    assert not result.modified
    assert "its probabilities, or what comes of them, are used elsewhere" in result.refusals[0].reason


def test_weights_go_into_one_product(fused):
    graph, result = fused(CUDA, attention(scores="m = MatMul(q, k)  n = Mul(m, half)  s = Add(n, mask)"))
    assert result.changes == {"attention fused": 1}
    assert graph.operators() == {"com.microsoft::Attention": 1}
    node = next(graph.nodes())
    assert [list(value.shape) for value in node.inputs[:3] if value is not None] == [["B", "S", 8], [8, 24], [24]]
    assert node.attributes["qkv_hidden_sizes"].value == (8, 8, 8)


def test_weights_that_others_use_stay_products(fused):
    graph, _ = fused(CUDA, attention(end="n = Reshape(t, join)  z = MatMul(n, wq)  y = Add(z, bq)"))
    assert graph.operators()["com.microsoft::MultiHeadAttention"] == 1
    assert "com.microsoft::Attention" not in graph.operators()


def test_a_product_that_is_split_gives_weights_too(fused):
    graph, result = fused(
        CUDA,
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[B,S,8] x) => (float[B,S,8] y) <float[8,24] w, float[24] b, int64[3] parts = {8, 8, 8},
            int64[4] split = {0, 0, 2, 4}, int64[3] join = {0, 0, 8}> {
            c = MatMul(x, w)  d = Add(c, b)  qa, ka, va = Split <axis = -1> (d, parts)
            qs = Reshape(qa, split)  q = Transpose <perm = [0, 2, 1, 3]> (qs)
            ks = Reshape(ka, split)  k = Transpose <perm = [0, 2, 3, 1]> (ks)
            vs = Reshape(va, split)  v = Transpose <perm = [0, 2, 1, 3]> (vs)
            s = MatMul(q, k)  p = Softmax <axis = -1> (s)  o = MatMul(p, v)
            t = Transpose <perm = [0, 2, 1, 3]> (o)  y = Reshape(t, join) }""",
    )
    assert result.changes == {"attention fused": 1}
    assert graph.operators() == {"com.microsoft::Attention": 1}


@pytest.mark.parametrize(
    ("parts", "scale", "inputs"),
    [
        ({}, 0.5, 3),
        ({"scores": "m = MatMul(q, k)  n = Mul(half, m)  d = Add(flat, n)  s = Add(d, mask)"}, 0.5, 4),
        ({"scores": "m = MatMul(q, k)  n = Mul(m, half)  s = Add(n, row)"}, 0.5, 4),
        ({"scores": "m = MatMul(q, k)  s = Where(allowed, m, lowest)", "probabilities": GUARD}, 1.0, 4),
        ({"scores": ROTATED + "s = MatMul(u, l)", "probabilities": "e = Neg(v)  o = MatMul(p, e)"}, 1.0, 3),
        ({"scores": "n = Neg(k)  s = MatMul(q, n)"}, 1.0, 3),
        ({"end": "y = Reshape(t, join)"}, 0.5, 3),
    ],
)
def test_the_operator_of_onnx_takes_joined_heads(fused, parts, scale, inputs):
    graph, result = fused(TENSORRT, attention(**parts))
    assert result.changes == {"attention fused": 1}
    assert not result.refusals
    assert graph.opset == 23
    node = node_of(graph, "Attention")
    assert not node.domain
    assert [node.attributes[name].value for name in ("q_num_heads", "kv_num_heads")] == [2, 2]
    assert node.attributes["scale"].value == pytest.approx(scale)
    assert len(node.inputs) == inputs
    assert all(len(value.shape) == 3 for value in node.inputs[:3])


@pytest.mark.parametrize("scores", ["s = Add(o, mask)", "s = Mul(o, one)"])
def test_the_operator_of_onnx_with_batch_and_heads_as_one_axis(fused, scores):
    text = FOLDED.replace("s = Add(o, mask)", scores).replace("float half", "float one = {1}, float half")
    graph, result = fused(TENSORRT, text)
    assert result.changes == {"attention fused": 1}
    assert node_of(graph, "Attention").attributes["scale"].value == pytest.approx(0.5)


def test_the_operator_of_onnx_begins_with_an_opset(fill, context):
    graph = fill(attention())
    result = ONNX(graph, context(graph))
    assert not result.modified
    assert "no attention to fuse: opset 17 has no Attention; opset 23 is the first" in result.refusals[0].reason
    assert graph.opset == 17


def test_the_operator_of_onnx_takes_positive_scales(fill, context):
    graph = fill(attention().replace("half = {0.5}", "half = {-0.5}"))
    result = TENSORRT(graph, context(graph))
    assert not result.modified
    assert "its scale is -0.5, and Attention takes positive ones" in result.refusals[0].reason
    assert graph.opset == 17


def test_where_the_opset_cannot_be_raised_attention_stays(fill, context, monkeypatch):
    refusal = PassResult(modified=False, refusals=(Refusal("opset 17 could not be converted to 23: why"),))
    monkeypatch.setattr(Opset, "apply", lambda *_: refusal)
    graph = fill(attention())
    result = TENSORRT(graph, context(graph))
    assert [refused.reason for refused in result.refusals] == [
        "opset 17 could not be converted to 23: why",
        "no attention to fuse: opset 17 has no Attention; opset 23 is the first",
    ]
