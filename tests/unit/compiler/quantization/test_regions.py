"""Graphs as text; what attention reaches stays out of 8 bits in TensorRT before 10."""

import numpy as np
import onnx.parser
import pytest

from enginesmith.compiler.graph import Graph
from enginesmith.compiler.quantization.regions import REASON, around_attention
from enginesmith.compiler.quantization.tensorrt import plan

HYBRID = """
<ir_version: 8, opset_import: ["" : 17]>
hybrid (float[n,16,16,16] x, float[n,4,16,64] k, float[n,4,64,16] v) => (float[n,4,16,32] y, float[n,32] z)
<float[16,16,1,1] w1, float[64,16,4,4] w2, float[16,16] w3, float[16,32] w4, float[16,32] w5,
 int64[4] heads = {0, 4, 16, 16}>
{
  c1 = Conv(x, w1)
  c2 = Conv<strides=[4,4]>(c1, w2)
  tokens = Reshape(c2, heads)
  q = MatMul(tokens, w3)
  scores = MatMul(q, k)
  p = Softmax<axis=-1>(scores)
  mixed = MatMul(p, v)
  y = MatMul(mixed, w4)
  pooled = GlobalAveragePool(c1)
  flat = Flatten(pooled)
  z = Gemm(flat, w5)
}
"""


def graph(text):
    model = onnx.parser.parse_model(text)
    given = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.value_info:
        if value.name not in given:
            shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), value.name))
    made = Graph.from_proto(model)
    made.infer()
    return made


def chosen(found):
    return {node.outputs[0].name for node in found.nodes}


def test_convolutions_and_pooling_part_a_region():
    made = graph(HYBRID)
    region = {node.outputs[0].name for node in around_attention(list(made.model.graph))}
    assert region == {"tokens", "q", "scores", "p", "mixed", "y"}


def test_products_in_a_region_stay_float_with_the_reason():
    found = plan(graph(HYBRID), regions=False)
    assert chosen(found) == {"c1", "c2", "pooled", "z"}
    assert [refusal.reason for refusal in found.refusals] == [REASON] * 4
    assert chosen(plan(graph(HYBRID))) == {"c1", "c2", "q", "y", "pooled", "z"}


def test_what_the_user_keeps_tells_its_own_reason():
    made = graph(HYBRID)
    kept = {node: "kept by choice" for node in made.model.graph if node.outputs[0].name in ("q", "z")}
    reasons = [refusal.reason for refusal in plan(made, regions=False, keep=kept).refusals]
    assert sorted(reasons) == sorted([REASON] * 3 + ["kept by choice"] * 2)


@pytest.mark.parametrize("text", ["y = MatMul(x, w)", "a = MatMul(x, w) y = Softmax(a)"])
def test_products_without_attention_are_in_no_region(text):
    header = '<ir_version: 8, opset_import: ["" : 17]>'
    made = graph(f"{header} g (float[n,32] x) => (float[n,32] y) <float[32,32] w> {{ {text} }}")
    assert around_attention(list(made.model.graph)) == frozenset()
    assert len(plan(made, regions=False).nodes) == 1
