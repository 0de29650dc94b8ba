from __future__ import annotations

import dataclasses

import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest

from enginesmith.compiler.calibration import Calibration
from enginesmith.compiler.graph import Graph, probe
from enginesmith.errors import RecipeError
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Refusal
from enginesmith.passes.quantize_weights import QuantizeWeights

HEADER = '<ir_version: 10, opset_import: ["": 21]>\n'
K, N = 192, 256
MATMUL = "g (float[B,S,192] x) => (float[B,S,256] y) { y = MatMul(x, w) }"
LEAST = {8: 36, 4: 18}
"""SNR in dB that is reached on weights of a normal distribution."""


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def run(context):
    """Runs the pass on text, with initializers given as arrays, and gives graph, result and graph before."""

    def apply(text: str, rule: QuantizeWeights, **arrays: np.ndarray):
        proto = onnx.parser.parse_model(text if text.startswith("<") else HEADER + text)
        proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
        graph = Graph.from_proto(proto)
        graph.infer()
        graph.verify()
        before = graph.clone()
        return graph, rule(graph, context(graph)), before

    return apply


def snr(before: Graph, after: Graph, *shape: int) -> float:
    """The lowest of all outputs, in dB."""
    inputs = {"x": weight(*shape, seed=1)}
    expected, found = probe.run(before, inputs), probe.run(after, inputs)
    assert list(expected) == list(found)
    return min(10 * np.log10((a**2).sum() / ((a - found[name]) ** 2).sum()) for name, a in expected.items())


def reasons(result) -> set[str]:
    return {refusal.reason for refusal in result.refusals}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [None, True])
def test_onnxruntime_takes_matmulnbits(run, bits, symmetric):
    graph, result, before = run(MATMUL, QuantizeWeights(bits=bits, symmetric=symmetric), w=weight(K, N))
    (node,) = graph.nodes()
    assert (node.op_type, node.name) == ("MatMulNBits", next(before.nodes()).name)
    assert node.attributes["accuracy_level"].value == 4
    assert len(node.inputs) == (3 if symmetric else 4)
    assert result.changes == {"MatMul quantized": 1}
    assert graph.weight_bytes < before.weight_bytes / (3.5 if bits == 8 else 6)
    assert result.details["weight_bytes"] == {"before": before.weight_bytes, "after": graph.weight_bytes}
    graph.infer()
    assert graph.model.graph.outputs[0].shape == before.model.graph.outputs[0].shape
    assert snr(before, graph, 2, 3, K) > LEAST[bits]


@pytest.mark.parametrize("bits", [4, 8])
def test_tensorrt_takes_dequantizelinear(run, bits):
    graph, _, before = run(MATMUL, QuantizeWeights(bits=bits, scheme="tensorrt", block=64), w=weight(K, N))
    assert graph.operators() == {"DequantizeLinear": 1, "MatMul": 1}
    numbers = graph.model.graph.initializers["w/quantized"]
    assert numbers.dtype == (ir.DataType.INT4 if bits == 4 else ir.DataType.INT8)
    assert graph.model.graph.initializers["w/scale"].shape == ((3, N) if bits == 4 else (N,))
    assert (graph.model.graph.initializers["w/scale"].const_value.numpy() > 0).all()
    assert snr(before, graph, 2, 3, K) > LEAST[bits] - 1.5


@pytest.mark.parametrize("scheme", ["onnxruntime", "tensorrt"])
def test_gemm(run, scheme):
    text = "g (float[5,192] x) => (float[5,256] y) { y = Gemm<transB = 1, alpha = 2.0, beta = 0.5>(x, w, b) }"
    graph, _, before = run(text, QuantizeWeights(scheme=scheme), w=weight(N, K), b=weight(N))
    assert graph.operators()["Gemm"] == 0
    assert snr(before, graph, 5, K) > 34


@pytest.mark.parametrize("scheme", ["onnxruntime", "tensorrt"])
def test_shared_weights_are_quantized_once(run, scheme):
    text = "g (float[5,192] x) => (float[5,256] y, float[5,256] z) { y = MatMul(x, w)  n = Neg(x)  z = MatMul(n, w) }"
    graph, _, before = run(text, QuantizeWeights(scheme=scheme, symmetric=True), w=weight(K, N))
    assert sorted(graph.model.graph.initializers) == ["w/quantized", "w/scale"]
    assert graph.operators()["DequantizeLinear"] == (scheme == "tensorrt")
    assert snr(before, graph, 5, K) > 36


def test_rows_that_fill_no_block(run):
    text = MATMUL.replace("192", "200")
    graph, _, before = run(text, QuantizeWeights(bits=4, block=128), w=weight(200, N))
    assert snr(before, graph, 1, 2, 200) > 16
    _, result, _ = run(text, QuantizeWeights(bits=4, scheme="tensorrt"), w=weight(200, N))
    assert reasons(result) == {"its 200 rows make no whole blocks of 128"}


def test_block_is_one_that_fits(run):
    for rule, size in ((QuantizeWeights(), 64), (QuantizeWeights(bits=4), 32), (QuantizeWeights(block=16), 16)):
        graph, _, _ = run(MATMUL, rule, w=weight(K, N))
        assert next(graph.nodes()).attributes["block_size"].value == size


def test_float16_weights(run):
    text = MATMUL.replace("float", "float16")
    graph, _, before = run(text, QuantizeWeights(), w=weight(K, N).astype(np.float16))
    assert graph.model.graph.initializers["w/scale"].dtype == ir.DataType.FLOAT16
    inputs = {"x": weight(1, 2, K).astype(np.float16)}
    expected, found = (probe.run(g, inputs)["y"].astype(np.float32) for g in (before, graph))
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("text", "shape", "reason"),
    [
        (MATMUL, (2, K, N), "its weight has 3 dimensions, kernels take 2"),
        (MATMUL.replace("256", "128"), (K, 128), "its weight of 192 x 128 is too small to gain"),
        (MATMUL.replace("float", "double"), (K, N), "its input is DOUBLE, kernels take float32 or float16"),
    ],
)
def test_stays_float(run, text, shape, reason):
    dtype = np.float64 if "double" in text else np.float32
    _, result, _ = run(text.replace("[B,", "[2,"), QuantizeWeights(), w=weight(*shape).astype(dtype))
    assert not result.modified
    assert result.refusals == (Refusal(reason, "y"),)


def test_keep(run):
    _, result, _ = run(MATMUL.replace("y =", "[fc_1] y ="), QuantizeWeights(keep=("fc_*",)), w=weight(K, N))
    assert result.refusals == (Refusal("kept by choice: 'fc_*'", "fc_1"),)


@pytest.mark.parametrize("scheme", ["onnxruntime", "tensorrt"])
def test_second_run_says_what_it_keeps(run, context, scheme):
    rule = QuantizeWeights(scheme=scheme)
    graph, _, _ = run(MATMUL, rule, w=weight(K, N))
    kept = {"onnxruntime": "1 MatMulNBits", "tensorrt": "1 DequantizeLinear"}[scheme]
    assert f"already quantized and kept: {kept}" in reasons(rule(graph, context(graph)))


def test_opset_too_old_for_blocks(run):
    header = '<ir_version: 8, opset_import: ["": 17]>\n'
    _, result, _ = run(header + MATMUL, QuantizeWeights(bits=4, scheme="tensorrt"), w=weight(K, N))
    assert reasons(result) == {"opset 17 has no INT4 in blocks: run opset:least=21 first"}


TABLE = "g (int64[A,B] i) => (float[A,B,64] y, float[A,64] z) { y = Gather(t, i)  o = ReduceMin<keepdims = 0>(i, a)"
TABLE += "  z = Gather(t, o) }"


def test_tables_are_stored_by_rows(run):
    arrays = {"t": weight(1000, 64) * np.geomspace(1, 1e3, 1000, dtype=np.float32)[:, None], "a": np.array([1])}
    graph, result, before = run(TABLE, QuantizeWeights(tables=True), **arrays)
    assert result.changes == {"tables quantized": 2}
    assert sorted(graph.model.graph.initializers) == ["a", "t/quantized", "t/scale"]
    graph.infer()
    indices = {"i": np.array([[0, 5, 999], [17, 17, 400]])}
    expected, found = probe.run(before, indices), probe.run(graph, indices)
    for name, array in expected.items():
        assert (np.abs(found[name] - array).max(axis=-1) < 0.005 * np.abs(array).max(axis=-1)).all()


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (QuantizeWeights(), "its table of 1 MB stays float: tables=true stores a quarter of it"),
        (
            QuantizeWeights(scheme="tensorrt", tables=True),
            "its table stays float: TensorRT takes INT8 before DequantizeLinear alone",
        ),
        (QuantizeWeights(tables=True, keep=("?",)), "kept by choice: '?'"),
    ],
)
def test_tables_that_stay(run, rule, reason):
    _, result, _ = run(TABLE, rule, t=weight(3000, 64), a=np.array([1]))
    assert not result.modified
    assert reasons(result) == {reason}


def test_table_with_nan_stays(run):
    broken = weight(3000, 64)
    broken[4] = np.inf
    _, result, _ = run(TABLE, QuantizeWeights(tables=True), t=broken, a=np.array([1]))
    assert reasons(result) == {"its table holds NaN or Inf"}


class Samples(list):
    description = "made up"
    random = False


def related(count: int) -> np.ndarray:
    """Inputs whose channels go together, so that one weight can make up for another."""
    random = np.random.default_rng(5)
    return (random.standard_normal((count, 16)) @ random.standard_normal((16, K))).astype(np.float32)


@pytest.mark.parametrize("scheme", ["onnxruntime", "tensorrt"])
def test_gptq_is_nearer_on_data(context, scheme):
    found = {}
    x = related(600)
    for rounding in ("nearest", "gptq"):
        proto = onnx.parser.parse_model(HEADER + "g (float[B,192] x) => (float[B,256] y) { y = MatMul(x, w) }")
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight(K, N), "w"))
        graph = Graph.from_proto(proto)
        graph.infer()
        before = graph.clone()
        calibration = Calibration(Samples({"x": x[start : start + 20]} for start in range(0, 500, 20)))
        rule = QuantizeWeights(bits=4, scheme=scheme, block=64, rounding=rounding, accuracy_level=0)
        result = rule(graph, dataclasses.replace(context(graph), calibration=calibration))
        assert result.changes.get("weights rounded by GPTQ", 0) == (rounding == "gptq")
        expected, after = (probe.run(g, {"x": x[500:]})["y"] for g in (before, graph))
        found[rounding] = ((expected - after) ** 2).sum()
    assert found["gptq"] < 0.2 * found["nearest"]


def test_gptq_leaves_out_what_it_cannot_round(context):
    text = "g (float[B,192] x) => (float[B,256] y) { y = Gemm<alpha = 2.0>(x, w) }"
    proto = onnx.parser.parse_model(HEADER + text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight(K, N), "w"))
    for scheme, reason in (
        ("onnxruntime", "rounded to nearest: not float32, or with factors"),
        ("tensorrt", "rounded to nearest: INT8 for TensorRT is not in blocks"),
    ):
        graph = Graph.from_proto(proto)
        calibrated = dataclasses.replace(context(graph), calibration=Calibration(Samples([{"x": related(8)}])))
        result = QuantizeWeights(scheme=scheme, rounding="gptq")(graph, calibrated)
        assert result.changes == {"Gemm quantized": 1}
        assert reasons(result) == {reason}


def test_gptq_needs_calibration(run):
    with pytest.raises(RecipeError, match="rounding=gptq needs calibration data"):
        run(MATMUL, QuantizeWeights(rounding="gptq"), w=weight(K, N))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits=3", "bits is 4 or 8, not 3"),
        ("block=48", "block is one of 16, 32, 64, 128, 256, not 48"),
        ("accuracy_level=5", "accuracy_level is 0 to 4, not 5"),
        ("scheme=tensorrt,symmetric=false", "TensorRT takes no zero points"),
    ],
)
def test_options(text, message):
    with pytest.raises(RecipeError, match=message):
        parse_pass(f"quantize-weights:{text}")


def test_text_form():
    text = "quantize-weights:bits=4,block=64,keep=a+b"
    assert str(parse_pass(text)) == text
