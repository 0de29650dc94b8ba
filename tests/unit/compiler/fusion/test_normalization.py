from __future__ import annotations

import pytest

from enginesmith.passes.fuse_transformer import FuseTransformer

CPU, CUDA, ONNX = (FuseTransformer(scheme=name) for name in ("onnxruntime-cpu", "onnxruntime-cuda", "onnx"))

NORM = """<ir_version: 8, opset_import: ["": 17]>
g (float[B,S,8] x, float[B,S,8] skip, float[S,8] position) => (float[B,S,8] y)
    <float[8] g, float[8] b, float[8] c, float e = {0.00001}, float two = {2}, float one = {1}> { BODY }"""


@pytest.mark.parametrize(
    "body",
    [
        "m = ReduceMean <axes = [-1]> (x)  d = Sub(x, m)  q = Pow(d, two)  v = ReduceMean <axes = [2]> (q)  "
        "w = Add(v, e)  s = Sqrt(w)  n = Div(d, s)  u = Mul(n, g)  y = Add(u, b)",
        "m = ReduceMean <axes = [-1]> (x)  d = Sub(x, m)  q = Mul(d, d)  v = ReduceMean <axes = [-1]> (q)  "
        "w = Add(e, v)  s = Sqrt(w)  r = Reciprocal(s)  n = Mul(d, r)  u = Mul(g, n)  y = Add(b, u)",
        "m = ReduceMean <axes = [-1]> (x)  d = Sub(x, m)  q = Mul(d, d)  v = ReduceMean <axes = [-1]> (q)  "
        "w = Add(e, v)  s = Sqrt(w)  r = Div(one, s)  y = Mul(r, d)",
    ],
)
@pytest.mark.parametrize("rule", [CPU, CUDA, ONNX], ids=["cpu", "cuda", "onnx"])
def test_normalization_in_primitives(fused, body, rule):
    graph, result = fused(rule, NORM.replace("BODY", body))
    assert result.changes == {"LayerNormalization fused": 1}
    assert graph.operators() == {"LayerNormalization": 1}
    assert next(graph.nodes()).attributes["epsilon"].value == pytest.approx(1e-5)


VARIANCE = "  q = Mul(d, d)  v = ReduceMean <axes = [-1]> (q)  w = Add(v, e)  s = Sqrt(w)  y = Div(d, s)"


def test_normalization_needs_opset_17(fill, context):
    body = "m = ReduceMean <axes = [-1]> (x)  d = Sub(x, m)" + VARIANCE
    graph = fill(NORM.replace("BODY", body).replace('"": 17', '"": 16'))
    result = CPU(graph, context(graph))
    assert not result.modified
    assert "opset 16 has no LayerNormalization; opset 17 is the first" in result.refusals[0].reason


@pytest.mark.parametrize(
    "body",
    [
        "m = ReduceMean <axes = [1]> (x)  d = Sub(x, m)" + VARIANCE,
        "m = ReduceMean <axes = [-1]> (x)  d = Sub(x, m)" + VARIANCE.replace("d, d", "x, x"),
        "m = ReduceMean <axes = [-1]> (skip)  d = Sub(x, m)" + VARIANCE,
        "d = Identity(x)" + VARIANCE,
    ],
)
def test_leaves_what_is_no_normalization(fill, context, body):
    graph = fill(NORM.replace("BODY", body))
    assert not CPU(graph, context(graph)).modified


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        ("t = Add(x, skip)  y = LayerNormalization(t, g, b)", ["x", "skip", "g", "b"]),
        ("t = Add(x, skip)  y = LayerNormalization(t, g)", ["x", "skip", "g"]),
        ("a = Add(x, c)  t = Add(a, skip)  y = LayerNormalization(t, g, b)", ["x", "skip", "g", "b", "c"]),
        ("a = Add(c, x)  t = Add(skip, a)  y = LayerNormalization(t, g, b)", ["x", "skip", "g", "b", "c"]),
        ("t = Add(position, x)  y = LayerNormalization(t, g, b)", ["x", "position", "g", "b"]),
    ],
)
def test_sum_goes_into_normalization(fused, body, inputs):
    graph, result = fused(CUDA, NORM.replace("BODY", body))
    assert result.changes == {"sum and LayerNormalization fused": 1}
    (node,) = graph.nodes()
    assert node.op_type == "SkipLayerNormalization"
    assert [value.name for value in node.inputs if value is not None] == inputs


def test_sum_that_others_read_is_given_too(fused):
    body = "t = Add(x, skip)  u = Neg(t)  n = LayerNormalization(t, g, b)  y = Add(n, u)"
    graph, _ = fused(CUDA, NORM.replace("BODY", body))
    node = next(node for node in graph.nodes() if node.domain)
    assert [value.name for value in node.outputs] == ["n", "", "", "t"]
    assert graph.operators()["Add"] == 1


@pytest.mark.parametrize(
    "body",
    [
        "t = Add(x, c)  y = LayerNormalization(t, g, b)",
        "t = Add(x, skip)  y = LayerNormalization <axis = 1> (t, wide)",
        "t = Sub(x, skip)  y = LayerNormalization(t, g, b)",
    ],
)
def test_leaves_sums_that_do_not_fit(fill, context, body):
    text = NORM.replace("BODY", body).replace("float[B,S,8]", "float[B,4,8]").replace("float[S,8]", "float[4,8]")
    graph = fill(text.replace("float[8] g,", "float[8] g, float[4,8] wide,"))
    assert not CUDA(graph, context(graph)).modified
