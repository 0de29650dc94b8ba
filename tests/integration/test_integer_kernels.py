"""That engines take quantized graphs as they are meant: fused, and with weights that stay small."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnxruntime
import pytest

from enginesmith.compiler.graph import Graph
from enginesmith.compiler.signature import Signature
from enginesmith.passes.base import Context
from enginesmith.passes.quantize_dynamic import QuantizeDynamic
from enginesmith.passes.quantize_weights import QuantizeWeights

HEADER = '<ir_version: 10, opset_import: ["": 21]>\n'
LINEAR = "g (float[4,256] x) => (float[4,512] y) { m = MatMul(x, w)  y = Add(m, b) }"


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def quantized(text: str, rule: QuantizeDynamic | QuantizeWeights, **arrays: np.ndarray) -> Graph:
    proto = onnx.parser.parse_model(HEADER + text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    graph = Graph.from_proto(proto)
    rule(graph, Context(Signature(inputs=())))
    return graph


def fused(graph: Graph, tmp_path) -> dict[str, int]:
    """Operators of the main graph after ONNX Runtime's optimizations."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    model = graph.to_proto().SerializeToString()
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return dict(collections.Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node))


@pytest.mark.parametrize(
    ("text", "shape"),
    [(LINEAR, (256, 512)), ("g (float[4,256] x) => (float[4,512] y) { y = Gemm<transB = 1>(x, w, b) }", (512, 256))],
)
def test_onnxruntime_fuses_a_dynamic_product_with_its_bias(tmp_path, text, shape):
    graph = quantized(text, QuantizeDynamic(), w=weight(*shape), b=weight(512))
    assert fused(graph, tmp_path) == {"DynamicQuantizeMatMul": 1}


def test_onnxruntime_quantizes_once_for_three_products(tmp_path):
    text = """g (float[4,256] x) => (float[4,512] q, float[4,512] k, float[4,512] v) {
        q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv) }"""
    graph = quantized(text, QuantizeDynamic(), wq=weight(256, 512), wk=-weight(256, 512), wv=2 * weight(256, 512))
    assert fused(graph, tmp_path) == {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 3}


@pytest.mark.parametrize(("bits", "part"), [(8, 0.6), (4, 0.5)])
def test_tensorrt_keeps_weights_small(bits, part):
    trt = pytest.importorskip("tensorrt_rtx")
    sizes = []
    for rule in (QuantizeWeights(keep=("*",)), QuantizeWeights(bits=bits, scheme="tensorrt")):
        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network()
        parser = trt.OnnxParser(network, logger)
        text = LINEAR.replace("512", "2048")
        model = quantized(text, rule, w=weight(256, 2048), b=weight(2048)).to_proto().SerializeToString()
        assert parser.parse(model), parser.get_error(0).desc()
        sizes.append(builder.build_serialized_network(network, builder.create_builder_config()).nbytes)
    assert sizes[1] < part * sizes[0]
