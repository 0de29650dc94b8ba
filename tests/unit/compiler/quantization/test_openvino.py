import numpy as np
import onnx.parser
import onnx_ir as ir

from enginesmith.compiler.graph import Graph
from enginesmith.compiler.quantization.openvino import plan

BLOCK = """
<ir_version: 10, opset_import: ["" : 18]>
agraph (float[N, 3, 8, 8] x) => (float[N, 8, 8, 8] y)
<float[8, 3, 3, 3] w1, float[8, 8, 1, 1] w2>
{
  a = Conv<pads = [1, 1, 1, 1]>(x, w1)
  b = Relu(a)
  c = Conv(b, w2)
  s = Add(c, b)
  y = Relu(s)
}
"""
ATTENTION = """
<ir_version: 10, opset_import: ["" : 18]>
agraph (float[N, 4, 8] x) => (float[N, 4, 8] y)
<float[8, 8] w, float[8, 8] v>
{
  q = MatMul(x, w)
  k = Transpose<perm = [0, 2, 1]>(q)
  scores = MatMul(q, k)
  p = Softmax<axis = -1>(scores)
  mixed = MatMul(p, q)
  y = MatMul(mixed, v)
}
"""


def graph(text):
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    for value in model.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = np.asarray(random.standard_normal(shape), np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    made = Graph.from_proto(model)
    made.infer()
    return made


def reads(found):
    return {
        name: sorted(f"{u.node.outputs[0].name}:{u.place}" for u in uses) for name, uses in found.activations.items()
    }


def test_layers_of_few_channels_and_skip_branches_are_quantized_to_uint8_with_zero_points():
    found = plan(graph(BLOCK))
    assert reads(found) == {"x": ["a:0"], "b": ["c:0", "s:1"], "c": ["s:0"]}
    assert found.padded == {"x"}
    assert (found.dtype, found.symmetric, found.biases) == (ir.DataType.UINT8, False, ())
    assert {(weight.value.name, weight.axis, weight.dtype) for weight in found.weights} == {
        ("w1", 0, ir.DataType.INT8),
        ("w2", 0, ir.DataType.INT8),
    }


def test_what_is_pooled_for_8_bit_layers_alone_is_quantized_before():
    pool = "MaxPool<kernel_shape = [1, 1]>"
    pooled = BLOCK.replace("b = Relu(a)", f"r = Relu(a)  b = {pool}(r)")
    assert reads(plan(graph(pooled))) == {"x": ["a:0"], "r": ["b:0"], "c": ["s:0"]}
    twice = pooled.replace(f"b = {pool}(r)", f"m = {pool}(r)  b = {pool}(m)")
    assert reads(plan(graph(twice))) == {"x": ["a:0"], "r": ["m:0"], "c": ["s:0"]}
    read_elsewhere = pooled.replace("s = Add(c, b)", "s = Sub(c, b)")
    assert reads(plan(graph(read_elsewhere))) == {"x": ["a:0"], "b": ["c:0"]}
    of_input = BLOCK.replace("a = Conv", f"i = {pool}(x)  a = Conv").replace("(x, w1)", "(i, w1)")
    assert reads(plan(graph(of_input)))["i"] == ["a:0"]


def test_attention_stays_float_and_says_why():
    found = plan(graph(ATTENTION))
    assert reads(found) == {"x": ["q:0"], "mixed": ["y:0"]}
    assert {r.reason for r in found.refusals} == {"attention stays float, one kernel with its softmax"}
    assert len(found.refusals) == 2


def test_nodes_that_are_kept_say_why():
    made = graph(BLOCK)
    conv = next(node for node in made.nodes() if node.op_type == "Conv")
    found = plan(made, keep={conv: "kept"})
    assert reads(found) == {"b": ["c:0", "s:1"], "c": ["s:0"]}
    assert [r.reason for r in found.refusals] == ["kept"]


def test_recurrent_layers_stay_float():
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    agraph (float[5, N, 8] x) => (float[5, 1, N, 4] y)
    <float[1, 16, 8] w, float[1, 16, 4] r>
    { y = LSTM<hidden_size = 4>(x, w, r) }
    """
    assert [r.reason for r in plan(graph(text)).refusals] == ["8 bits make recurrent layers no faster in OpenVINO"]
