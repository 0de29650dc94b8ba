"""Small graphs as ONNX text. What is called w or b, with a number, becomes a constant of random numbers."""

from __future__ import annotations

import re

import numpy as np
import onnx.parser
import onnx_ir as ir

from enginesmith.compiler.dimensions import Dimensions
from enginesmith.compiler.graph import Graph
from enginesmith.compiler.graph.editing import add_initializer, flattened

HEADER = '<ir_version: 8, opset_import: ["": 17]>\n'


def build(text: str) -> Graph:
    """A flat graph with its constants in initializers."""
    header = "" if text.lstrip().startswith("<") else HEADER
    graph = Graph.from_proto(onnx.parser.parse_model(header + text))
    main, generator = graph.model.graph, np.random.default_rng(0)
    for value in list(main.inputs):
        if re.fullmatch(r"[wb]\d+", value.name):
            main.inputs.remove(value)
            shape, dtype = value.shape.numpy(), value.dtype.numpy()
            array = generator.standard_normal(shape) if dtype.kind == "f" else generator.integers(1, 100, shape)
            made = add_initializer(graph, f"{value.name}_", array.astype(dtype))
            value.replace_all_uses_with(made)
            made.name = value.name
    for name, value in list(main.initializers.items()):
        if name != value.name:
            main.initializers[value.name] = main.initializers.pop(name)
    return flattened(graph)


def analysed(text: str) -> Dimensions:
    """The groups of a graph."""
    return Dimensions(build(text))


def find(dimensions: Dimensions, name: str, axis: int):
    """The one group that an axis of a tensor is made of."""
    value = next(v for v in values(dimensions.graph) if v.name == name)
    (group,) = dimensions.at(value, axis)
    return group


def values(graph: Graph) -> list[ir.Value]:
    """All tensors of the main graph."""
    main = graph.model.graph
    return [*main.inputs, *main.initializers.values(), *(output for node in main for output in node.outputs)]


LAYERS = "float[8,6] w1, float[6,5] w2"


def between(body, extra="", constants="", header="", x="float[n,4,8] x", y="float[n,4,5] y", weights=LAYERS):
    """A hidden layer of six, what is done to it (h becomes z), and a layer that reads it."""
    return f"""{header} g ({x}, {weights}{extra}) => ({y}) {constants} {{
        h = MatMul(x, w1)  {body}  y = MatMul(z, w2) }}"""


GRAPHS = {
    "conv": """g (float[n,3,8,8] x, float[6,3,3,3] w1, float[6] b1, float[5,6,1,1] w2) => (float[n,5,m,k] y) {
        a = Conv<pads=[1,1,1,1]>(x, w1, b1)  r = Relu(a)  p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
        y = Conv(p, w2) }""",
    "batch norm": """g (float[n,3,8,8] x, float[6,3,1,1] w1, float[6] b1, float[6] b2, float[6] b3, float[6] b4,
        float[5,6,1,1] w2) => (float[n,5,8,8] y) {
        a = Conv(x, w1)  v = Abs(b4)  c = BatchNormalization(a, b1, b2, b3, v)  r = Relu(c)  y = Conv(r, w2) }""",
    "grouped": """g (float[n,4,8,8] x, float[8,4,1,1] w1, float[8,2,3,3] w2, float[8] b2, float[3,8,1,1] w3)
        => (float[n,3,8,8] y) {
        a = Conv(x, w1)  r = Relu(a)  c = Conv<group=4, pads=[1,1,1,1]>(r, w2, b2)  s = Relu(c)  y = Conv(s, w3) }""",
    "depthwise": """g (float[n,4,8,8] x, float[8,4,1,1] w1, float[8,1,3,3] w2, float[8] b2, float[3,8,1,1] w3)
        => (float[n,3,8,8] y) {
        a = Conv(x, w1)  c = Conv<group=8, pads=[1,1,1,1]>(a, w2, b2)  r = Relu(c)  y = Conv(r, w3) }""",
    "squeeze-excite": """g (float[n,3,8,8] x, float[8,3,1,1] w1, float[4,8,1,1] w2, float[8,4,1,1] w3,
        float[5,8,1,1] w4) => (float[n,5,8,8] y) {
        a = Conv(x, w1)  r = Relu(a)  p = GlobalAveragePool(r)  q = Conv(p, w2)  s = Relu(q)  t = Conv(s, w3)
        u = Sigmoid(t)  v = Mul(r, u)  y = Conv(v, w4) }""",
    "residual": """g (float[n,3,8,8] x, float[6,3,1,1] w1, float[6,6,3,3] w2, float[6] b2, float[5,6,1,1] w3)
        => (float[n,5,8,8] y) {
        a = Conv(x, w1)  c = Conv<pads=[1,1,1,1]>(a, w2, b2)  s = Add(a, c)  r = Relu(s)  y = Conv(r, w3) }""",
    "dense": """g (float[n,3,4,4] x, float[6,3,1,1] w1, float[4,6,1,1] w2, float[5,10,1,1] w3, float[7,15,1,1] w4)
        => (float[n,7,4,4] y) {
        a = Conv(x, w1)  c = Conv(a, w2)  d = Concat<axis=1>(a, c)  e = Conv(d, w3)  f = Concat<axis=1>(d, e)
        r = Relu(f)  y = Conv(r, w4) }""",
    "split": """g (float[n,3,4,4] x, float[12,3,1,1] w1, float[4,4,1,1] w2, float[5,12,1,1] w3) => (float[n,5,4,4] y)
        <int64[2] s = {4, 8}> {
        a = Conv(x, w1)  p, q = Split<axis=1>(a, s)  c = Conv(p, w2)  d = Concat<axis=1>(c, q)  y = Conv(d, w3) }""",
    "slice": """g (float[n,3,4,4] x, float[12,3,1,1] w1, float[5,6,1,1] w2, float[5,2,1,1] w3) => (float[n,5,4,4] y)
        <int64[1] low = {3}, int64[1] high = {9}, int64[1] axis = {1}, int64[1] end = {-2}, int64[1] big = {99}> {
        a = Conv(x, w1)  p = Slice(a, low, high, axis)  c = Conv(p, w2)  q = Slice(a, end, big, axis)
        d = Conv(q, w3)  y = Add(c, d) }""",
    "slice from the end": """g (float[n,3,4,4] x, float[12,3,1,1] w1, float[5,10,1,1] w2, float[5,12,1,1] w3,
        float[5,1,1] w4) => (float[n,5,4,4] y)
        <int64[1] low = {0}, int64[1] high = {-2}, int64[1] axis = {1}, int64[1] twelve = {12}, int64 third = {-3}> {
        a = Conv(x, w1)  p = Slice(a, low, high, axis)  c = Conv(p, w2)  q = Slice(a, low, twelve, axis)
        d = Conv(q, w3)  g1 = Gather<axis=1>(a, third)  h = Unsqueeze(g1, axis)  i = Mul(h, w4)  e = Add(c, d)
        y = Add(e, i) }""",
    "slice of steps and channels": """g (float[n,s,8] x, float[8,12] w1, float[6,5] w2) => (float[n,t,5] y)
        <int64[2] low = {0, 3}, int64[2] high = {-1, 9}, int64[2] axes = {1, 2}> {
        a = MatMul(x, w1)  p = Slice(a, low, high, axes)  y = MatMul(p, w2) }""",
    "transposed": """g (float[n,3,4,4] x, float[3,6,2,2] w1, float[6] b1, float[6,5,2,2] w2) => (float[n,5,m,k] y) {
        a = ConvTranspose<strides=[2,2]>(x, w1, b1)  r = Relu(a)  y = ConvTranspose<strides=[2,2]>(r, w2) }""",
    "flatten": """g (float[n,3,4,4] x, float[6,3,1,1] w1, float[5,96] w2, float[5] b2, float[5,7] w3)
        => (float[n,7] y) {
        a = Conv(x, w1)  r = Relu(a)  f = Flatten(r)  h = Gemm<transB=1>(f, w2, b2)  y = Gemm(h, w3) }""",
    "shuffle": """g (float[n,3,4,4] x, float[8,3,1,1] w1, float[8,2,1,1] w2, float[5,8,1,1] w3) => (float[n,5,4,4] y)
        <int64[5] apart = {0, 2, 4, 4, 4}, int64[4] back = {0, -1, 4, 4}> {
        a = Conv(x, w1)  b = Reshape(a, apart)  c = Transpose<perm=[0,2,1,3,4]>(b)  d = Reshape(c, back)
        e = Conv<group=4>(d, w2)  y = Conv(e, w3) }""",
    "pixels": """g (float[n,3,4,4] x, float[24,3,1,1] w1, float[5,6,1,1] w2) => (float[n,5,8,8] y) {
        a = Conv(x, w1)  b = DepthToSpace<blocksize=2, mode="CRD">(a)  y = Conv(b, w2) }""",
    "group norm": """g (float[n,3,4,4] x, float[8,3,1,1] w1, float[4] b1, float[4] b2, float[8,1,1] w2,
        float[5,8,1,1] w3) => (float[n,5,4,4] y) <int64[3] apart = {0, 4, -1}> {
        a = Conv(x, w1)  s = Shape(a)  b = Reshape(a, apart)  c = InstanceNormalization(b, b1, b2)  d = Reshape(c, s)
        e = Mul(d, w2)  y = Conv(e, w3) }""",
    "lstm": """g (float[t,n,3] x, float[2,24,3] w1, float[2,24,6] w2, float[2,48] w3, float[12,5] w4)
        => (float[t,n,5] y) <int64[3] joined = {0, 0, -1}> {
        a = LSTM<hidden_size=6, direction="bidirectional">(x, w1, w2, w3)  b = Transpose<perm=[0,2,1,3]>(a)
        c = Reshape(b, joined)  y = MatMul(c, w4) }""",
    "gru": """g (float[t,n,3] x, float[1,18,3] w1, float[1,18,6] w2, float[1,36] w3, float[6,5] w4)
        => (float[t,n,5] y) <int64[1] one = {1}> {
        a = GRU<hidden_size=6, linear_before_reset=1>(x, w1, w2, w3)  b = Squeeze(a, one)  y = MatMul(b, w4) }""",
    "fused attention": """g (float[n,5,8] x, float[8,36] w1, float[36] b1, float[12,8] w2) => (float[n,5,8] y)
        <int64[5] apart = {0, 5, 3, 2, 6}, int64[3] joined = {0, 5, 12}, int64 zero = {0}, int64 one = {1},
         int64 two = {2}> {
        a = MatMul(x, w1)  b = Add(a, b1)  c = Reshape(b, apart)  d = Transpose<perm=[2,0,3,1,4]>(c)
        q = Gather(d, zero)  k = Gather(d, one)  v = Gather(d, two)  t = Transpose<perm=[0,1,3,2]>(k)
        s = MatMul(q, t)  p = Softmax<axis=-1>(s)  o = MatMul(p, v)  u = Transpose<perm=[0,2,1,3]>(o)
        j = Reshape(u, joined)  y = MatMul(j, w2) }""",
    "head bias": """g (float[n,5,8] x, float[8,36] w1, float[1,2,5,5] w2, float[12,8] w3) => (float[n,5,8] y)
        <int64[4] apart = {0, 5, 2, 6}, int64[3] joined = {0, 5, -1}> {
        a = MatMul(x, w1)  q, k, v = Split<axis=-1>(a)  e = Reshape(q, apart)  f = Reshape(k, apart)
        h = Reshape(v, apart)  l = Transpose<perm=[0,2,1,3]>(e)  m = Transpose<perm=[0,2,3,1]>(f)
        c = Transpose<perm=[0,2,1,3]>(h)  s = MatMul(l, m)  t = Add(s, w2)  p = Softmax<axis=-1>(t)
        o = MatMul(p, c)  u = Transpose<perm=[0,2,1,3]>(o)  j = Reshape(u, joined)  y = MatMul(j, w3) }""",
    "computed shapes": """g (float[n,s,8] x, float[8,12] w1, float[8,12] w2, float[12,8] w3) => (float[n,s,8] y)
        <int64 zero = {0}, int64 one = {1}, int64[1] first = {0}, int64[1] heads = {2}, int64[1] size = {6},
         int64[1] width = {12}> {
        a = MatMul(x, w1)  c = MatMul(x, w2)  t = Shape(x)  i = Gather(t, zero)  j = Gather(t, one)
        k = Unsqueeze(i, first)  l = Unsqueeze(j, first)  z = Concat<axis=0>(k, l, heads, size)
        q = Reshape(a, z)  v = Reshape(c, z)  d = Transpose<perm=[0,2,1,3]>(q)  e = Transpose<perm=[0,2,3,1]>(q)
        f = Transpose<perm=[0,2,1,3]>(v)  g1 = MatMul(d, e)  p = Softmax<axis=-1>(g1)  o = MatMul(p, f)
        u = Transpose<perm=[0,2,1,3]>(o)  r = Concat<axis=0>(k, l, width)  h = Reshape(u, r)  y = MatMul(h, w3) }""",
    "heads in the batch": """g (float[s,n,8] x, float[8,12] w1, float[12,8] w2) => (float[s,n,8] y)
        <int64 one = {1}, int64[1] first = {0}, int64 heads = {2}, int64[1] size = {6}, int64[1] width = {12},
         int64 zero = {0}> {
        a = MatMul(x, w1)  t = Shape(x)  i = Gather(t, zero)  j = Gather(t, one)  k = Unsqueeze(i, first)
        m = Mul(j, heads)  l = Unsqueeze(m, first)  z = Concat<axis=0>(k, l, size)  q = Reshape(a, z)
        d = Transpose<perm=[1,0,2]>(q)  e = Transpose<perm=[1,2,0]>(q)  f = MatMul(d, e)  p = Softmax<axis=-1>(f)
        o = MatMul(p, d)  u = Transpose<perm=[1,0,2]>(o)  b = Unsqueeze(j, first)  r = Concat<axis=0>(k, b, width)
        h = Reshape(u, r)  y = MatMul(h, w2) }""",
    "halves": """g (float[n,5,8] x, float[8,8] w1, float[1,5,4] w2, float[8,3] w3) => (float[n,5,3] y)
        <int64[1] zero = {0}, int64[1] four = {4}, int64[1] big = {99}, int64[1] last = {-1}> {
        a = MatMul(x, w1)  c = Concat<axis=-1>(w2, w2)  f = Slice(a, zero, four, last)  g1 = Slice(a, four, big, last)
        h = Neg(g1)  r = Concat<axis=-1>(h, f)  i = Mul(a, c)  j = Mul(r, c)  k = Add(i, j)  y = MatMul(k, w3) }""",
    "einsum": """g (float[n,5,8] x, float[8,2,6] w1, float[2,6,3] w2) => (float[n,5,3] y) {
        a = Einsum<equation="bsd,dhk->bshk">(x, w1)  y = Einsum<equation="bshk,hkm->bsm">(a, w2) }""",
    "class token": """g (float[n,4,8] x, float[8,6] w1, float[1,1,6] w2, float[1,5,6] w3, float[6,3] w4)
        => (float[n,3] y) <int64[1] first = {0}, int64[1] one = {1}, int64[1] width = {6},
         int64 zero = {0}> {
        a = MatMul(x, w1)  t = Shape<start=0, end=1>(x)  s = Concat<axis=0>(t, one, width)  c = Expand(w2, s)
        d = Concat<axis=1>(c, a)  e = Add(d, w3)  f = Gather<axis=1>(e, zero)  y = MatMul(f, w4) }""",
    "read with its length": """g (float[n,3,4,4] x, float[6,3,1,1] w1, float[5,6,1,1] w2) => (float[n,5,4,4] y)
        <int64 one = {1}> {
        a = Conv(x, w1)  s = Shape(a)  c = Gather(s, one)  f = Cast<to=1>(c)  r = Sqrt(f)  d = Div(a, r)
        y = Conv(d, w2) }""",
    "filled": """g (float[n,5,8] x, float[8,6] w1, float[6,3] w2) => (float[n,5,3] y)
        <int64[1] five = {5}, int64[1] six = {6}> {
        a = MatMul(x, w1)  t = Shape<start=0, end=1>(x)  s = Concat<axis=0>(t, five, six)  z = ConstantOfShape(s)
        b = Add(a, z)  y = MatMul(b, w2) }""",
}
"""Graphs all of whose inner groups may shrink and grow, or shrink alone, and leave the outputs as they are."""
