"""What each kind of operator makes of new positions, in graphs of a few nodes."""

from __future__ import annotations

import pytest

from enginesmith.compiler.alignment.evaluate import unsafe
from enginesmith.compiler.dimensions import Dimensions
from enginesmith.compiler.graph.editing import flattened

HEAD = """g (float[N,7,16] x) => (float[N,7,8] y) <float[16,30] w, float[30] b, float[30,8] v, float[30] ones,
    int64[1] last = {2}, float[30,30] u, uint8 point = {128}, uint8 zero = {0}, float scale = {0.1}> {
    [made] h = MatMul(x, w) """


def refusal(fill, body: str, head: str = HEAD) -> str:
    """Why the dimension that "made" makes must not grow."""
    dimensions = Dimensions(flattened(fill(f"{head} {body} }}")))
    group = next(group for group in dimensions.groups if group.name == "made")
    return unsafe(dimensions, [group.dim]).get(group.dim, "")


@pytest.mark.parametrize(
    "body",
    [
        "a = Add(h, b)  y = MatMul(a, v)",
        "a = Exp(h)  y = MatMul(a, v)",
        "r = ReduceMean<axes = [1], keepdims = 1>(h)  a = Sub(h, r)  y = MatMul(a, v)",
        "r = ReduceMax<axes = [1], keepdims = 1>(h)  a = Sub(h, r)  e = Exp(a)  y = MatMul(e, v)",
        "a = Softmax<axis = 1>(h)  y = MatMul(a, v)",
        "a = Mul(h, h)  s = ReduceSum<keepdims = 1>(a, last)  q = MatMul(h, v)  y = Mul(q, s)",
        "t = Transpose<perm = [0, 2, 1]>(h)  g = MatMul(t, h)  z = MatMul(h, g)  y = MatMul(z, v)",
        'y = Einsum<equation = "nij, jk -> nik">(h, v)',
        "axis = Constant<value_int = 1>()  a = CumSum(h, axis)  y = MatMul(a, v)",
        "q = QuantizeLinear(h, scale, point)  d = DequantizeLinear(q, scale, point)  "
        "s = ReduceSum<keepdims = 1>(d, last)  m = MatMul(d, v)  y = Mul(m, s)",
        "e = Exp(h)  q = QuantizeLinear(e, scale, zero)  d = DequantizeLinear(q, scale, zero)  y = MatMul(d, v)",
        "c = Concat<axis = 1>(h, h)  s = Shape(c)  k, l = Split<axis = 1>(c)  y = MatMul(k, v)",
    ],
)
def test_may_grow(fill, body):
    assert refusal(fill, body) == ""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a = Log(h)  y = MatMul(a, v)", "Log may make NaN or infinity in new places (a)"),
        ("a = Exp(h)  s = ReduceSum<keepdims = 1>(a, last)  m = MatMul(a, v)  y = Mul(m, s)",
         "ReduceSum sums over new places, which are not 0 (s)"),
        ("a = Exp(h)  t = Transpose<perm = [0, 2, 1]>(a)  g = MatMul(a, t)  k = MatMul(h, v)  y = MatMul(g, k)",
         "MatMul sums over new places, and neither factor is 0 there (g)"),
        ("m = ReduceMean<axes = [2], keepdims = 1>(x)  a = Add(h, m)  e = Exp(a)  y = MatMul(e, v)",
         "Exp may make NaN or infinity in new places (e)"),
        ("a = LpNormalization<axis = 1>(h)  y = MatMul(a, v)",
         "what LpNormalization makes of new places is not known (a)"),
        ("a = ReduceLogSum<axes = [1], keepdims = 1>(h)  m = Mul(a, h)  y = MatMul(m, v)",
         "ReduceLogSum may make NaN or infinity in new places (a)"),
        ('e = Cos(h)  f = Cos(h)  g = Einsum<equation = "nij, nkj -> nik">(e, f)  m = MatMul(h, v)  y = MatMul(g, m)',
         "Einsum sums over new places, and no factor is 0 there (g)"),
        ("c = Cos(h)  q, s, z = DynamicQuantizeLinear(c)  d = DequantizeLinear(q, s, z)  y = MatMul(d, v)",
         "DynamicQuantizeLinear takes its range from new places, which are not 0 (q)"),
        ("m = ReduceMean<axes = [2], keepdims = 1>(x)  e = Sigmoid(h)  a = Pow(m, e)  y = MatMul(a, v)",
         "Pow may make NaN or infinity in new places (a)"),
    ],
)  # fmt: skip
def test_must_not_grow(fill, body, reason):
    assert refusal(fill, body) == reason


def test_only_what_is_asked_for_is_looked_at(fill):
    dimensions = Dimensions(flattened(fill(HEAD + "a = Log(h)  y = MatMul(a, v) }")))
    assert unsafe(dimensions, []) == {}
