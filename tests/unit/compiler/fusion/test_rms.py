"""RMSNorm of a sum as one node."""

from __future__ import annotations

import pytest

from enginesmith.passes.fuse_transformer import FuseTransformer

CPU, CUDA, ONNX = (FuseTransformer(scheme=name) for name in ("onnxruntime-cpu", "onnxruntime-cuda", "onnx"))

GRAPH = """<ir_version: 8, opset_import: ["": 17]>
g (float[B,S,8] x, float[B,S,8] skip, float[S,8] position) => (float[B,S,8] y)
    <float[8] g, float[8] c, float e = {0.00001}, float two = {2}, float one = {1}> { BODY }"""
ROOT = "  v = ReduceMean <axes = [-1]> (q)  w = Add(v, e)  r = Sqrt(w)  "
NORM = "q = Pow(s, two)" + ROOT + "n = Div(s, r)  "
OPERATOR = "com.microsoft::SkipSimplifiedLayerNormalization"


def graph(body: str) -> str:
    return GRAPH.replace("BODY", body)


@pytest.mark.parametrize("rule", [CPU, CUDA], ids=["cpu", "cuda"])
@pytest.mark.parametrize(
    "norm",
    [
        NORM + "y = Mul(g, n)",
        "q = Mul(s, s)" + ROOT + "i = Reciprocal(r)  n = Mul(s, i)  y = Mul(n, g)",
        "q = Pow(s, two)" + ROOT + "i = Div(one, r)  n = Mul(i, s)  y = Mul(n, g)",
    ],
)
def test_the_sum_goes_into_the_normalization(fused, rule, norm):
    made, result = fused(rule, graph("s = Add(x, skip)  " + norm))
    assert result.changes == {"sum and RMSNorm fused": 1}
    assert made.operators() == {OPERATOR: 1}
    (node,) = made.nodes()
    assert node.attributes["epsilon"].value == pytest.approx(1e-5)
    assert [value.name for value in node.inputs] == ["x", "skip", "g"]


@pytest.mark.parametrize(
    ("body", "inputs", "outputs"),
    [
        ("t = Add(x, c)  s = Add(t, skip)  " + NORM + "y = Mul(g, n)", ["x", "skip", "g", "c"], 1),
        ("s = Add(position, x)  " + NORM + "y = Mul(g, n)", ["x", "position", "g"], 1),
        ("s = Add(x, skip)  " + NORM + "z = Mul(g, n)  y = Add(z, s)", ["x", "skip", "g"], 4),
    ],
    ids=["a bias", "rows that all share", "the sum is read elsewhere"],
)
def test_what_goes_in_and_what_comes_out(fused, body, inputs, outputs):
    made, _ = fused(CPU, graph(body))
    node = next(node for node in made.nodes() if node.op_type == "SkipSimplifiedLayerNormalization")
    assert [value.name for value in node.inputs] == inputs
    assert len(node.outputs) == outputs


@pytest.mark.parametrize(
    ("rule", "body"),
    [
        (ONNX, "s = Add(x, skip)  " + NORM + "y = Mul(g, n)"),
        (CPU, "s = Neg(x)  " + NORM + "y = Mul(g, n)"),
        (CPU, "s = Add(x, c)  " + NORM + "y = Mul(g, n)"),
        (CPU, "s = Add(x, skip)  " + NORM + "y = Mul(n, x)"),
        (CPU, "s = Add(x, skip)  " + NORM.replace("Pow(s", "Pow(x") + "y = Mul(g, n)"),
        (CPU, "s = Add(x, skip)  " + NORM.replace("[-1]", "[1]") + "y = Mul(g, n)"),
    ],
    ids=["ONNX", "no sum", "a sum with a constant", "no scale", "the mean of another", "another axis"],
)
def test_what_stays(fill, context, rule, body):
    made = fill(graph(body))
    before = made.fingerprint()
    assert not rule(made, context(made)).modified
    assert made.fingerprint() == before
