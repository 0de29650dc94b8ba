"""Networks to quantize, and noise to calibrate them on."""

import numpy as np
import onnx.parser

from enginesmith.compiler.calibration import Calibration, CalibrationSettings
from enginesmith.compiler.graph import Graph
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context

RESNET = """
<ir_version: 8, opset_import: ["" : 19]>
resnet (float[n,3,32,32] image) => (float[n,32] logits)
<float[32,3,3,3] w0, float[32] b0, float[32,32,3,3] w1, float[32] b1, float[32,32,3,3] w2, float[32] b2,
 float[64,32,3,3] w3, float[64] b3, float[64,64,3,3] w4, float[64] b4, float[64,32,1,1] w5, float[64] b5,
 float[64,32] w6, float[32] b6>
{
  stem = Conv<pads=[1,1,1,1]>(image, w0, b0)
  stem_r = Relu(stem)
  pool = MaxPool<kernel_shape=[2,2], strides=[2,2]>(stem_r)
  a1 = Conv<pads=[1,1,1,1]>(pool, w1, b1)
  a2 = Relu(a1)
  a3 = Conv<pads=[1,1,1,1]>(a2, w2, b2)
  a4 = Add(a3, pool)
  a = Relu(a4)
  c1 = Conv<pads=[1,1,1,1], strides=[2,2]>(a, w3, b3)
  c2 = Relu(c1)
  c3 = Conv<pads=[1,1,1,1]>(c2, w4, b4)
  c4 = Conv<strides=[2,2]>(a, w5, b5)
  c5 = Add(c3, c4)
  c = Relu(c5)
  mean = GlobalAveragePool(c)
  flat = Flatten(mean)
  logits = Gemm(flat, w6, b6)
}
"""

TRANSFORMER = """
<ir_version: 8, opset_import: ["" : 19]>
transformer (float[n,32,64] x, float[n,1,1,32] mask) => (float[n,32,64] y)
<float[64,64] wq, float[64,64] wk, float[64,64] wv, float[64,64] wo, float[64,256] w1, float[256,64] w2,
 float[64] scale, float[64] shift, int64[4] heads = {0, 32, 2, 32}, int64[3] merged = {0, 32, 64},
 float root = {0.4204}, float two = {1.4142}, float one = {1}, float half = {0.5}>
{
  ln = LayerNormalization<axis=-1>(x, scale, shift)
  q0 = MatMul(ln, wq)
  k0 = MatMul(ln, wk)
  v0 = MatMul(ln, wv)
  q1 = Reshape(q0, heads)
  k1 = Reshape(k0, heads)
  v1 = Reshape(v0, heads)
  q2 = Transpose<perm=[0,2,1,3]>(q1)
  k2 = Transpose<perm=[0,2,3,1]>(k1)
  v = Transpose<perm=[0,2,1,3]>(v1)
  q = Mul(q2, root)
  k = Mul(k2, root)
  scores = MatMul(q, k)
  masked = Add(scores, mask)
  p = Softmax<axis=-1>(masked)
  mixed = MatMul(p, v)
  back = Transpose<perm=[0,2,1,3]>(mixed)
  flat = Reshape(back, merged)
  o = MatMul(flat, wo)
  x1 = Add(o, ln)
  ln1 = LayerNormalization<axis=-1>(x1, scale, shift)
  f1 = MatMul(ln1, w1)
  g1 = Div(f1, two)
  g2 = Erf(g1)
  g3 = Add(g2, one)
  g4 = Mul(f1, g3)
  gelu = Mul(g4, half)
  f2 = MatMul(gelu, w2)
  x2 = Add(f2, ln1)
  y = LayerNormalization<axis=-1>(x2, scale, shift)
}
"""


class Batches:
    """Two batches of noise, labelled as data."""

    description = "noise"
    random = False

    def __init__(self, signature):
        self.signature = signature

    def __iter__(self):
        for seed in range(2):
            random = np.random.default_rng(seed)
            shapes = self.signature.shapes(self.signature.sizes("opt"))
            yield {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def load(text):
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    given = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.value_info:
        if value.name not in given:
            shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            array = random.standard_normal(shape) * 2 / np.sqrt(np.prod(shape[1:]) + 1)
            model.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), value.name))
    graph = Graph.from_proto(model)
    graph.infer()
    return graph


def lowered(target, precision, text, signature, **options):
    """The graph in float32, and as the target wants it in a precision."""
    samples = Batches(signature)
    graph = load(text)
    before = graph.clone()
    context = Context(signature, samples, Calibration(samples, CalibrationSettings()))
    for passed in target.lowering(precision):
        extra = "".join(f",{key}={value}" for key, value in options.items() if passed.startswith("quantize"))
        parse_pass(passed + extra)(graph, context)
    return before, graph
