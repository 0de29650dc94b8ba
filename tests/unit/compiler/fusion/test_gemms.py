import numpy as np
import onnx.numpy_helper
import onnx.parser
import pytest

from enginesmith.compiler.graph import Graph
from enginesmith.compiler.graph.probe import run
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context

TEXT = """
<ir_version: 8, opset_import: ["": 17]>
net (float[batch, 2, 8] x) => (float[batch, 2, 8] y)
<int64[2] flat = {-1, 8}, int64[3] back = {-1, 2, 8}, float half = {0.5}, float root = {1.4142135}, float one = {1}>
{
  rows = Reshape(x, flat)  inner = Gemm(rows, w0, b0)
  scaled = Div(inner, root)  erf = Erf(scaled)  more = Add(erf, one)  twice = Mul(inner, more)  act = Mul(twice, half)
  outer = Gemm<transB = 1>(act, w1, b1)  shown = Reshape(outer, back)  sum = Add(shown, x)
  y = LayerNormalization(sum, gain, shift)
}
"""
SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", 2, 8)),),
    (TensorSpec("y", "float32", ("batch", 2, 8)),),
    {"batch": AxisRange(1, 2, 4)},
)


def graph(text=TEXT):
    generator = np.random.default_rng(0)
    shapes = {"w0": (8, 12), "b0": (12,), "w1": (8, 12), "b1": (8,), "gain": (8,), "shift": (8,)}
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32), name)
        for name, shape in shapes.items()
        if name in text
    )
    made = Graph.from_proto(model)
    made.infer()
    return made


def fused(made, scheme="onnxruntime-cuda"):
    return parse_pass(f"fuse-transformer:scheme={scheme}")(made, Context(SIGNATURE))


def test_what_comes_next_adds_the_bias():
    before, after = graph(), graph()
    assert fused(after).changes == {"GELU fused": 1, "sum and LayerNormalization fused": 1}
    operators = after.operators()
    assert operators["MatMul"] == 2
    assert not operators.keys() & {"Gemm", "Add"}
    nodes = {node.op_type: node for node in after.model.graph}
    assert nodes["BiasGelu"].inputs[1].name == "b0"
    assert nodes["SkipLayerNormalization"].inputs[4].name == "b1"
    x = np.random.default_rng(1).standard_normal((3, 2, 8)).astype(np.float32)
    assert run(after, {"x": x})["y"] == pytest.approx(run(before, {"x": x})["y"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Gemm(rows, w0, b0)", "Gemm<alpha = 0.5>(rows, w0, b0)"),
        ("Gemm(rows, w0, b0)", "Gemm(rows, w0)"),
        ("sum = Add(shown, x)", "sum = Mul(shown, x)"),
    ],
)
def test_others_stay(old, new):
    assert old in TEXT
    made = graph(TEXT.replace(old, new))
    fused(made)
    assert made.operators()["Gemm"] == 1


def test_the_cpu_adds_biases_within_its_products():
    made = graph()
    fused(made, "onnxruntime-cpu")
    assert made.operators()["Gemm"] == 2
