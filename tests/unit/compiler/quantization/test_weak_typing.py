"""A float32 graph with Q/DQ as TensorRT 8.6 takes it."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from enginesmith.compiler.graph import Graph
from enginesmith.compiler.graph.probe import run
from enginesmith.compiler.quantization.weak_typing import in_half, prepare, without_quantization
from enginesmith.compiler.signature import Signature
from enginesmith.passes.base import Context
from enginesmith.passes.pin import Pin

CONV = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[n,16,4,4] x) => (float[n,16,4,4] y)
<int8[16,16,1,1] w, float[16] scales, int8[16] zeros, float xs = {0.05}, int8 xz = {0}, float big = {1000}>
{
  wd = DequantizeLinear<axis=0>(w, scales, zeros)
  xq = QuantizeLinear(x, xs, xz)
  xd = DequantizeLinear(xq, xs, xz)
  c = Conv(xd, wd)
  large = Mul(c, big)
  y = Erf(large)
}
"""

MASKED = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[n,16] x) => (float[n,16] y) <float minus = {-3.4e38}, float xs = {0.05}, int8 xz = {0}>
{
  xq = QuantizeLinear(x, xs, xz)
  xd = DequantizeLinear(xq, xs, xz)
  masked = Add(xd, minus)
  y = Softmax(masked)
}
"""


def quantized():
    model = onnx.parser.parse_model(CONV)
    random = np.random.default_rng(0)
    values = {
        "w": random.integers(-127, 128, (16, 16, 1, 1)).astype(np.int8),
        "scales": random.uniform(0.001, 0.02, 16).astype(np.float32),
        "zeros": np.zeros(16, np.int8),
    }
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in values.items())
    graph = Graph.from_proto(model)
    graph.infer()
    return graph


def sample(scale=1.0):
    return {"x": (scale * np.random.default_rng(1).standard_normal((2, 16, 4, 4))).astype(np.float32)}


def ready(graph, inputs):
    log = []
    prepared, types = prepare(graph, Signature(inputs=()), inputs, log.append)
    prepared.verify()
    return prepared, types, log


def test_weights_are_float32_and_quantized_by_the_network_to_the_same_numbers():
    graph = quantized()
    prepared, _, _ = ready(graph, sample())
    nodes = {node.outputs[0].name: node for node in prepared.nodes()}
    quantize = nodes["wd"].inputs[0].producer()
    assert (quantize.op_type, quantize.attributes.get_int("axis")) == ("QuantizeLinear", 0)
    assert [value.name for value in quantize.inputs[1:]] == ["scales", "zeros"]
    assert quantize.inputs[0].const_value.dtype == ir.DataType.FLOAT
    assert "w" not in prepared.model.graph.initializers
    (now,), (then,) = run(prepared, sample()).values(), run(graph, sample()).values()
    np.testing.assert_array_equal(now, then)


def test_convolutions_tell_the_shape_of_their_kernel():
    graph = quantized()
    prepared, _, _ = ready(graph, sample())
    (conv,) = (node for node in prepared.nodes() if node.op_type == "Conv")
    assert conv.attributes.get_ints("kernel_shape") == (1, 1)
    (now,), (then,) = run(prepared, sample()).values(), run(graph, sample()).values()
    np.testing.assert_array_equal(now, then)


def test_nodes_that_were_pinned_stay_in_fp32():
    graph = quantized()
    Pin(keep=("y",))(graph, Context(Signature(inputs=())))
    _, types, log = ready(graph, sample())
    assert types["y"] == "FLOAT"
    assert types["c"] == "HALF"
    assert "y stays in fp32: kept by choice: 'y'" in log


def test_what_is_given_stays_as_it_was():
    graph = quantized()
    before = graph.fingerprint()
    ready(graph, sample())
    assert graph.fingerprint() == before


def test_tensors_that_overflow_are_to_be_float32_and_all_others_fp16():
    _, types, log = ready(quantized(), sample(100.0))
    assert types["large"] == types["y"] == "FLOAT"
    assert types["c"] == "HALF"
    assert any(line.startswith("node_large stays in fp32") or "large" in line for line in log)
    assert ready(quantized(), sample(0.01))[1]["large"] == "HALF"


def test_q_dq_does_not_decide_what_is_kept():
    """QuantizeLinear takes no float16 at opset 17, and what lies between two of them must be 8-bit all the same."""
    _, types, log = ready(quantized(), sample(0.01))
    assert set(types.values()) == {"HALF"}
    assert log == []


def test_masks_are_clamped():
    graph = Graph.from_proto(onnx.parser.parse_model(MASKED))
    graph.infer()
    prepared, _, _ = ready(graph, {"x": np.zeros((2, 16), np.float32)})
    assert prepared.model.graph.initializers["minus"].const_value.numpy() == np.float32(-32752)


def test_without_data_overflows_are_not_looked_for():
    assert ready(quantized(), {})[1]["large"] == "HALF"


def test_a_graph_without_its_quantization():
    graph = quantized()
    plain = without_quantization(graph)
    plain.verify()
    assert set(plain.operators()) == {"Conv", "Mul", "Erf"}
    (now,), (then,) = run(plain, sample()).values(), run(graph, sample()).values()
    assert np.mean(np.abs(now - then) > 0.3) < 0.02  # rounding may change the sign of what is near zero


@pytest.mark.parametrize("given", [{}, {"x": np.ones((2, 4), np.float32)}])
def test_what_is_not_quantized_is_cast_to_fp16(given):
    header = '<ir_version: 8, opset_import: ["" : 17]>'
    model = onnx.parser.parse_model(f"{header} g (float[n,4] x) => (float[n,4] y) {{ a = Relu(x) y = Erf(a) }}")
    graph = Graph.from_proto(model)
    graph.infer()
    cast = in_half(graph, Signature(inputs=()), given)
    assert dict(cast.operators()) == {"Cast": 2, "Relu": 1, "Erf": 1}
    assert "Cast" not in graph.operators()
