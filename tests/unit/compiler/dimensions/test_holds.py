"""Every reason that keeps an axis as it is."""

import runpy
from pathlib import Path

import pytest

helpers = runpy.run_path(str(Path(__file__).with_name("graphs.py")))
analysed, between, find = helpers["analysed"], helpers["between"], helpers["find"]

HELD = {
    "softmax": (between("z = Softmax<axis=-1>(h)"), "Softmax runs over it", "Softmax runs over it"),
    "cumulated": (
        between("z = CumSum(h, last)", constants="<int64 last = {-1}>"),
        "CumSum runs over it",
        "CumSum runs over it",
    ),
    "layer norm": (between("z = LayerNormalization(h, b1)", ", float[6] b1"), "", "it is normalized over"),
    "norm": (between("z = LpNormalization(h)"), "", "it is normalized over"),
    "mean": (
        between("m = ReduceMean<axes=[-1]>(h)  z = Sub(h, m)"),
        "",
        "ReduceMean runs over it",
    ),
    "sum": (between("m = ReduceSum(h, last)  z = Sub(h, m)", constants="<int64[1] last = {-1}>"), "", ""),
    "product": (
        between("m = ReduceProd<axes=[-1]>(h)  z = Sub(h, m)"),
        "ReduceProd runs over it",
        "ReduceProd runs over it",
    ),
    "largest": (
        between("m = ArgMax<axis=-1>(h)  c = Cast<to=1>(m)  z = Sub(h, c)"),
        "ArgMax runs over it",
        "ArgMax runs over it",
    ),
    "axes that are computed": (
        between("m = ReduceSum(h, a)  z = Sub(h, m)", ", int64[1] a"),
        "the axes that it reduces are computed",
        "the axes that it reduces are computed",
    ),
    "unknown operator": (between("z = Trilu(h)"), "Trilu is not followed", "Trilu is not followed"),
    "another attention": (
        between(
            "z = com.microsoft.Attention<num_heads=2>(h, w3, b1)",
            ", float[6,18] w3, float[18] b1",
            header='<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>',
            constants="<float[n,4,6] z>",
        ),
        "Attention is not followed",
        "Attention is not followed",
    ),
    "where the largest are": (
        between(
            """v = Unsqueeze(h, one)  p, i = MaxPool<kernel_shape=[1,1]>(v)  c = Cast<to=1>(i)  s = Add(p, c)
            z = Squeeze(s, one)""",
            constants="<int64[1] one = {1}>",
        ),
        "more outputs of MaxPool are used",
        "more outputs of MaxPool are used",
    ),
    "a softmax of old": (
        between("z = Softmax<axis=1>(h)", header='<ir_version: 6, opset_import: ["": 11]>'),
        "Softmax runs over it",
        "Softmax runs over it",
    ),
    "another domain": (
        between("z = local.Relu(h)", header='<ir_version: 8, opset_import: ["": 17, "local": 1]>'),
        "Relu is not followed",
        "Relu is not followed",
    ),
    "steps": (
        between(
            "z = Slice(h, zero, end, last, two)",
            constants="<int64[1] zero = {0}, int64[1] end = {6}, int64[1] last = {-1}, int64[1] two = {2}>",
            weights="float[8,6] w1, float[3,5] w2",
        ),
        "it is sliced in steps",
        "it is sliced in steps",
    ),
    "a computed cut": (
        between(
            "z = Slice(h, a, end, last)",
            ", int64[1] a",
            constants="<int64[1] end = {6}, int64[1] last = {-1}>",
            y="float[n,4,5] y",
        ),
        "where it cuts is computed",
        "where it cuts is computed",
    ),
    "several looked up": (
        between(
            "z = Gather<axis=-1>(h, i)",
            constants="<int64[2] i = {0, 3}>",
            weights="float[8,6] w1, float[2,5] w2",
        ),
        "positions are looked up in it",
        "positions are looked up in it",
    ),
    "padded": (
        between(
            "z = Pad(h, p)",
            constants="<int64[6] p = {0, 0, 0, 0, 0, 2}>",
            weights="float[8,6] w1, float[8,5] w2",
        ),
        "it is padded",
        "it is padded",
    ),
    "repeated": (
        between(
            "z = Tile(h, r)",
            constants="<int64[3] r = {1, 1, 2}>",
            weights="float[8,6] w1, float[12,5] w2",
        ),
        "it is repeated",
        "it is repeated",
    ),
    "a given shape": (
        between("z = Reshape(h, s)", ", int64[3] s"),
        "it is reshaped together with an axis of unknown length",
        "it is reshaped together with an axis of unknown length",
    ),
    "a given shape whose result is known": (
        between("z = Reshape(h, s)", ", int64[3] s", constants="<float[n,4,6] z>"),
        "the shape that it is given is computed",
        "the shape that it is given is computed",
    ),
    "the size of it all": (
        between("s = Size(h)  c = Cast<to=1>(s)  z = Div(h, c)"),
        "its length is read and computed with",
        "its length is read and computed with",
    ),
    "its length with others": (
        between("s = Shape(h)  c = Cast<to=1>(s)  d = ReduceProd<keepdims=0>(c)  z = Div(h, d)"),
        "its length is read and computed with",
        "its length is read and computed with",
    ),
    "its length by itself": (
        between("s = Shape<start=-1>(h)  c = Cast<to=1>(s)  z = Div(h, c)"),
        "",
        "",
    ),
    "a branch": (
        between(
            """c = ReduceSum<keepdims=0>(h)  o = Cast<to=9>(c)
            z = If(o) <then_branch = t () => (float[n,4,6] p) { p = Relu(h) },
                       else_branch = e () => (float[n,4,6] q) { q = Neg(h) }>"""
        ),
        "the body of If reads it",
        "the body of If reads it",
    ),
}


@pytest.mark.parametrize("name", HELD)
def test_what_is_done_along_an_axis_holds_it(name):
    text, shrink, grow = HELD[name]
    group = find(analysed(text), "w1", 1)
    assert group.size == 6
    assert group.why_not("shrink").rpartition(" (")[0] == shrink
    assert group.why_not("grow").rpartition(" (")[0] == grow
