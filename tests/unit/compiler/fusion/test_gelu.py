from __future__ import annotations

import pytest

from enginesmith.passes.fuse_transformer import FuseTransformer

CUDA, ONNX = FuseTransformer(scheme="onnxruntime-cuda"), FuseTransformer(scheme="onnx")

GELU = """g (float[B,6,4] x) => (float[B,6,4] y)
    <float half = {0.5}, float one = {1}, float three = {3}, float root = {1.4142135}, float inverse = {0.70710677},
     float cubic = {0.044715}, float angle = {0.7978846}, float alpha = {1.702}, float[4] b> { BODY }"""
FORMS = {
    "erf": ("d = Div(x, root)  e = Erf(d)  a = Add(e, one)  m = Mul(x, a)  y = Mul(m, half)", "exact"),
    "erf-half-first": ("h = Mul(x, half)  d = Mul(inverse, x)  e = Erf(d)  a = Add(one, e)  y = Mul(h, a)", "exact"),
    "erf-half-inside": ("d = Div(x, root)  e = Erf(d)  a = Add(e, one)  h = Mul(half, a)  y = Mul(x, h)", "exact"),
    "tanh": (
        "h = Mul(x, half)  c = Pow(x, three)  d = Mul(c, cubic)  s = Add(x, d)  m = Mul(s, angle)  e = Tanh(m)  "
        "a = Add(e, one)  y = Mul(h, a)",
        "tanh",
    ),
    "tanh-by-products": (
        "q = Mul(x, x)  c = Mul(x, q)  d = Mul(cubic, c)  s = Add(d, x)  m = Mul(angle, s)  e = Tanh(m)  "
        "a = Add(one, e)  n = Mul(x, a)  y = Mul(n, half)",
        "tanh",
    ),
    "tanh-factored": (
        "q = Mul(x, x)  d = Mul(cubic, q)  s = Add(one, d)  n = Mul(x, angle)  m = Mul(n, s)  e = Tanh(m)  "
        "a = Add(one, e)  h = Mul(x, half)  y = Mul(h, a)",
        "tanh",
    ),
    "sigmoid": ("d = Mul(x, alpha)  e = Sigmoid(d)  y = Mul(x, e)", "sigmoid"),
    "silu": ("e = Sigmoid(x)  y = Mul(e, x)", "sigmoid"),
}


def gelu(body: str, opset: int = 17) -> str:
    return f'<ir_version: 10, opset_import: ["": {opset}]>\n' + GELU.replace("BODY", body)


@pytest.mark.parametrize("name", FORMS)
def test_gelu_in_all_its_forms(fused, name):
    body, form = FORMS[name]
    graph, result = fused(CUDA, gelu(body))
    assert result.changes == {"GELU fused": 1}
    operator = {"exact": "Gelu", "tanh": "FastGelu", "sigmoid": "QuickGelu"}[form]
    assert graph.operators() == {f"com.microsoft::{operator}": 1}
    if form == "sigmoid":
        assert next(graph.nodes()).attributes["alpha"].value == pytest.approx(1.0 if name == "silu" else 1.702)


@pytest.mark.parametrize(("name", "operator"), [("erf", "BiasGelu"), ("tanh", "FastGelu")])
def test_gelu_takes_the_bias_before_it(fused, name, operator):
    body = "u = Add(x, b)  " + FORMS[name][0].replace("x", "u").replace("u = Add(u", "u = Add(x")
    graph, _ = fused(CUDA, gelu(body))
    assert graph.operators() == {f"com.microsoft::{operator}": 1}


def test_gelu_of_onnx_needs_opset_20(fused, fill, context):
    body = FORMS["tanh"][0]
    graph, _ = fused(ONNX, gelu(body, 20))
    assert graph.operators() == {"Gelu": 1}
    assert next(graph.nodes()).attributes["approximate"].value == "tanh"
    older = fill(gelu(body))
    result = ONNX(older, context(older))
    assert not result.modified
    assert "opset 17 has no Gelu; opset 20 is the first" in result.refusals[0].reason


def test_gelu_of_onnx_takes_its_bias_on_cuda(fused):
    graph, _ = fused(CUDA, gelu("u = Add(x, b)  y = Gelu(u)", 20))
    assert graph.operators() == {"com.microsoft::BiasGelu": 1}


def test_onnx_has_no_sigmoid_form(fill, context):
    graph = fill(gelu(FORMS["silu"][0], 20))
    result = ONNX(graph, context(graph))
    assert not result.modified
    assert "ONNX has no operator for x * sigmoid(a * x)" in result.refusals[0].reason


@pytest.mark.parametrize(
    "body",
    [
        "d = Div(x, one)  e = Erf(d)  a = Add(e, one)  m = Mul(x, a)  y = Mul(m, half)",  # not the root of two
        "d = Div(x, root)  e = Erf(d)  a = Add(e, half)  m = Mul(x, a)  y = Mul(m, half)",  # not one
        "d = Div(x, root)  e = Erf(d)  a = Add(e, one)  m = Mul(d, a)  y = Mul(m, half)",  # another factor
        "d = Div(x, root)  e = Erf(d)  a = Add(e, one)  y = Mul(x, a)",  # twice as much
        "c = Mul(x, x)  d = Mul(c, cubic)  s = Add(x, d)  m = Mul(s, angle)  e = Tanh(m)  a = Add(e, one)  "
        "h = Mul(x, half)  y = Mul(h, a)",  # the square in place of the cube
        "e = Sigmoid(x)  y = Div(x, e)",
        "e = Sigmoid(x)  n = Neg(x)  y = Mul(n, e)",
    ],
)
def test_leaves_what_is_no_gelu(fill, context, body):
    graph = fill(gelu(body))
    assert not CUDA(graph, context(graph)).modified
