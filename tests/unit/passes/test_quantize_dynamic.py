from __future__ import annotations

import dataclasses

import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest

from enginesmith.compiler.calibration import Calibration
from enginesmith.compiler.graph import Graph, probe
from enginesmith.compiler.quantization import recurrent, saturation
from enginesmith.errors import RecipeError
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Refusal
from enginesmith.passes.quantize_dynamic import QuantizeDynamic

HEADER = '<ir_version: 8, opset_import: ["": 17]>\n'
QUANTIZE = QuantizeDynamic()
K, N, HIDDEN = 64, 512, 32
CLOSE_DB = 34
"""SNR of products in 8 bits; weights have 7 where the processor lacks VNNI."""


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    """Columns of different sizes, so that one scale for all of them would show."""
    random = np.random.default_rng(seed)
    return (random.standard_normal(shape) * np.geomspace(0.01, 1, shape[-1])).astype(np.float32)


@pytest.fixture
def run(context):
    """Runs the pass on text, with initializers given as arrays, and gives graph, result and graph before."""

    def apply(text: str, rule: QuantizeDynamic = QUANTIZE, **arrays: np.ndarray):
        proto = onnx.parser.parse_model(text if text.startswith("<") else HEADER + text)
        proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
        graph = Graph.from_proto(proto)
        graph.infer()
        graph.verify()
        before = graph.clone()
        return graph, rule(graph, context(graph)), before

    return apply


def snr(before: Graph, after: Graph, inputs: dict[str, np.ndarray]) -> float:
    """The lowest of all outputs, in dB."""
    expected, found = probe.run(before, inputs), probe.run(after, inputs)
    assert list(expected) == list(found)
    return min(10 * np.log10((a**2).sum() / ((a - found[name]) ** 2).sum()) for name, a in expected.items())


def feed(*shape: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}


def reasons(result) -> set[str]:
    return {refusal.reason for refusal in result.refusals}


MATMUL = "g (float[B,S,64] x) => (float[B,S,512] y) { y = MatMul(x, w) }"


def test_matmul_takes_int8_columns_and_keeps_its_names(run):
    graph, result, before = run(MATMUL, w=weight(K, N))
    assert graph.operators() == {"DynamicQuantizeLinear": 1, "MatMulInteger": 1, "Cast": 1, "Mul": 2}
    assert result.changes == {"MatMul quantized": 1}
    assert result.details == {"weight_bytes": {"before": before.weight_bytes, "after": graph.weight_bytes}}
    assert graph.model.graph.initializers["w/quantized"].dtype == ir.DataType.INT8
    assert graph.model.graph.initializers["w/scale"].shape == (N,)
    assert "w" not in graph.model.graph.initializers
    assert graph.model.graph.outputs[0].shape == before.model.graph.outputs[0].shape
    assert snr(before, graph, feed(2, 3, K)) > CLOSE_DB


@pytest.mark.parametrize(
    ("attributes", "shape", "bias"),
    [("transB = 0", (K, N), (N,)), ("transB = 1", (N, K), (1, N)), ("alpha = 2.0, beta = 0.5", (K, N), (5, 1))],
)
def test_gemm(run, attributes, shape, bias):
    text = f"g (float[5,64] x) => (float[5,512] y) {{ y = Gemm<{attributes}>(x, w, b) }}"
    graph, result, before = run(text, w=weight(*shape), b=weight(*bias, seed=2))
    assert result.changes == {"Gemm quantized": 1}
    assert snr(before, graph, feed(5, K)) > CLOSE_DB


def test_gemm_whose_bias_counts_zero_times_or_is_computed(run):
    text = """g (float[5,64] x, float[512] c) => (float[5,512] y, float[5,512] z) {
        y = Gemm<beta = 0.0>(x, w, b)  z = Gemm(x, w, c) }"""
    graph, _, before = run(text, w=weight(K, N), b=weight(N))
    assert graph.operators()["Add"] == 1
    assert snr(before, graph, feed(5, K) | {"c": weight(N)}) > CLOSE_DB


def test_activations_and_weights_that_nodes_share_are_quantized_once(run):
    text = """g (float[B,64] x) => (float[B,512] y, float[B,512] z, float[B,512] u) {
        y = MatMul(x, w)  z = MatMul(x, v)  n = Neg(x)  u = MatMul(n, w) }"""
    graph, _, before = run(text, w=weight(K, N), v=weight(K, N, seed=3))
    assert graph.operators()["DynamicQuantizeLinear"] == 2
    assert sorted(graph.model.graph.initializers) == [
        f"{name}/{part}" for name in "vw" for part in ("quantized", "scale", "zero_point")
    ]
    assert snr(before, graph, feed(2, K)) > CLOSE_DB


def test_tied_embedding_is_untied(run):
    text = """g (int64[B] x) => (float[B,1024] y) {
        e = Gather(w, x)  t = Transpose<perm = [1, 0]>(w)  y = MatMul(e, t) }"""
    graph, _, before = run(text, w=weight(1024, K))
    assert graph.operators()["Transpose"] == 0
    assert graph.model.graph.initializers["w"].dtype == ir.DataType.FLOAT
    assert graph.model.graph.initializers["t/quantized"].shape == (K, 1024)
    assert snr(before, graph, {"x": np.arange(4)}) > CLOSE_DB


LSTM = """g (float[T,B,64] x) => (float[T,{d},B,32] y, float[{d},B,32] h) {{
    v = Concat<axis = 1>(w, w)  y, h = LSTM<hidden_size = 32, direction = "{direction}" {more}>(x, v, r, b) }}"""


@pytest.mark.parametrize(("directions", "direction"), [(1, "forward"), (2, "bidirectional")])
def test_lstm_whose_weights_are_computed(run, directions, direction):
    weights = {"w": (directions, 2 * HIDDEN, K), "r": (directions, 4 * HIDDEN, HIDDEN), "b": (directions, 8 * HIDDEN)}
    arrays = {name: weight(*shape) * 0.3 for name, shape in weights.items()}
    graph, result, before = run(LSTM.format(d=directions, direction=direction, more=""), **arrays)
    assert graph.operators() == {"com.microsoft::DynamicQuantizeLSTM": 1}
    assert result.changes == {"LSTM quantized": 1}
    assert graph.model.graph.initializers["v/quantized"].shape == (directions, K, 4 * HIDDEN)
    assert snr(before, graph, feed(6, 2, K)) > 25


GRU = """g (float[T,B,64] x{more}) => (float[T,{d},B,32] y, float[{d},B,32] h) {{
    y, h = GRU<hidden_size = 32, linear_before_reset = 1, direction = "{direction}">(x, w, r{bias}) }}"""


@pytest.mark.parametrize(
    ("directions", "direction", "bias"),
    [(1, "forward", ", b"), (1, "reverse", ""), (1, "reverse", ", b, , f"), (2, "bidirectional", ", b, , f")],
)
def test_gru(run, monkeypatch, directions, direction, bias):
    monkeypatch.setattr(recurrent, "NARROWEST", 32)
    shapes = {"w": (directions, 3 * HIDDEN, K), "r": (directions, 3 * HIDDEN, HIDDEN), "b": (directions, 6 * HIDDEN)}
    arrays = {name: weight(*shape) * 0.3 for name, shape in shapes.items() if name != "b" or "b" in bias}
    first = f", float[{directions},B,32] f" if "f" in bias else ""
    text = GRU.format(d=directions, direction=direction, bias=bias, more=first)
    graph, result, before = run(text, **arrays)
    graph.infer()
    assert result.changes == {"GRU quantized": 1}
    assert graph.operators()["Scan"] == directions
    assert graph.operators()["DynamicQuantizeLinear"] == 1
    inputs = feed(6, 2, K) | ({"f": weight(directions, 2, HIDDEN)} if first else {})
    assert snr(before, graph, inputs) > 30


def test_gru_whose_last_state_alone_is_used(run, monkeypatch):
    monkeypatch.setattr(recurrent, "NARROWEST", 32)
    text = (
        GRU.format(d=1, direction="forward", bias="", more="")
        .replace("float[T,1,B,32] y, ", "")
        .replace("y, h =", ", h =")
    )
    graph, _, before = run(text, w=weight(1, 96, K) * 0.3, r=weight(1, 96, HIDDEN) * 0.3)
    assert snr(before, graph, feed(6, 2, K)) > 30


@pytest.mark.parametrize(
    ("attributes", "inputs", "reason"),
    [
        ("", "x, w, r", "it resets before the product (linear_before_reset=0): a step would wait for two products"),
        ("linear_before_reset = 1, layout = 1,", "x, w, r", "its batch axis comes first (layout=1)"),
        ("linear_before_reset = 1,", "x, w, r, , n", "its sequences have lengths of their own (sequence_lens)"),
        (
            "linear_before_reset = 1, clip = 2.0,",
            "x, w, r",
            "it clips, or has other activations than Sigmoid and Tanh",
        ),
        ("linear_before_reset = 1,", "x, w, r, c", "its weights are not constant"),
    ],
)
def test_gru_stays(run, attributes, inputs, reason):
    text = f"""g (float[2,2,64] x, int32[2] n, float[1,192] c) => (float[T,D,B,32] y) {{
        y = GRU<{attributes} hidden_size = 32>({inputs}) }}"""
    assert reasons(run(text, w=weight(1, 96, K), r=weight(1, 96, HIDDEN))[1]) == {reason}


def test_opset_too_old_for_gru(run):
    header = '<ir_version: 7, opset_import: ["": 12]>\n'
    text = GRU.format(d=1, direction="forward", bias="", more="")
    found = reasons(run(header + text, w=weight(1, 96, K), r=weight(1, 96, HIDDEN))[1])
    assert found == {"opset 12 is too old for a GRU in int8; opset 13 is the first"}


def test_rnn_stays(run):
    text = "g (float[2,2,64] x) => (float[T,D,B,32] y) { y = RNN<hidden_size = 32>(x, w, r) }"
    found = reasons(run(text, w=weight(1, 32, K), r=weight(1, 32, HIDDEN))[1])
    assert found == {"ONNX Runtime has no integer RNN"}


def test_lstm_with_batch_first_stays(run):
    text = """g (float[B,T,64] x, float[1,128,64] w) => (float[B,T,1,32] y, float[T,1,B,32] z) {
        y = LSTM<hidden_size = 32, layout = 1>(x, w, r)  z = LSTM<hidden_size = 32>(x, w, r) }"""
    _, result, _ = run(text.replace("[T,1,B,32]", "[B,1,T,32]"), r=weight(1, 128, 32))
    assert reasons(result) == {
        "its batch axis comes first (layout=1), which DynamicQuantizeLSTM does not take",
        "its weights are not constant",
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("g (float[5,64] x, float[64,512] w) => (float[5,512] y) { y = MatMul(x, w) }", "its weight is not constant"),
        (
            "g (float[512,64] x) => (float[64,64] y) { y = MatMul(w, x) }",
            "its weight is the first operand; kernels take a quantized weight as the second",
        ),
        (
            "g (float[64,5] x) => (float[5,512] y) { y = Gemm<transA = 1>(x, w) }",
            "its first operand is transposed (transA)",
        ),
        (
            "g (float[5,64] x, float[512] c) => (float[5,512] y) { y = Gemm<beta = 0.5>(x, w, c) }",
            "it scales a bias that is not constant (beta=0.5)",
        ),
    ],
)
def test_stays_float(run, text, reason):
    arrays = {} if " w)" in text.split("=>")[0] else {"w": weight(K, N)}
    _, result, _ = run(text, **arrays)
    assert not result.modified
    assert result.refusals == (Refusal(reason, "y"),)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((2, K, N), "its weight has 3 dimensions, kernels take 2"),
        ((K, 500), "its weight of 64 x 500 is too small to gain"),
    ],
)
def test_weights_that_do_not_gain_stay(run, shape, reason):
    text = MATMUL.replace("float[B,S,512] y", f"float[B,S,{shape[-1]}] y").replace("[B,", "[2,")
    assert reasons(run(text, w=weight(*shape))[1]) == {reason}


def test_weight_with_nan_stays(run):
    broken = weight(K, N)
    broken[3, 4] = np.nan
    assert reasons(run(MATMUL, w=broken)[1]) == {"weight 'w' holds NaN or Inf"}


def test_float16_stays(run):
    text = MATMUL.replace("float", "float16")
    assert reasons(run(text, w=weight(K, N).astype(np.float16))[1]) == {
        "its input is FLOAT16, integer kernels take float32"
    }


def test_what_is_quantized_already_is_kept(run):
    text = """g (float[5,64] x) => (float[5,512] y) <float s = {0.1}> {
        d = DequantizeLinear(w, s)  v = Transpose<perm = [1, 0]>(d)  y = MatMul(x, v) }"""
    _, result, _ = run(text, w=np.ones((N, K), np.int8))
    assert reasons(result) == {"already quantized", "already quantized and kept: 1 DequantizeLinear"}


def test_second_run_says_what_it_keeps(run, context):
    graph, _, _ = run(MATMUL, w=weight(K, N))
    again = QUANTIZE(graph, context(graph))
    assert reasons(again) == {"already quantized and kept: 1 DynamicQuantizeLinear, 1 MatMulInteger"}


def test_keep(run):
    text = "g (float[B,64] x) => (float[B,512] y) { [fc_1] y = MatMul(x, w) }"
    _, result, _ = run(text, QuantizeDynamic(keep=("fc_*",)), w=weight(K, N))
    assert result.refusals == (Refusal("kept by choice: 'fc_*'", "fc_1"),)


def test_subgraphs_gru_and_convolutions_stay(run):
    text = """g (bool c, float[5,64] x, float[1,3,8,8] i) => (float[5,512] y, float[5,1,1,8] h, float[1,2,8,8] k)
        {
        y = If (c) <then_branch = t () => (float[5,512] a) { a = MatMul(x, w) },
            else_branch = e () => (float[5,512] b) { b = MatMul(x, w) }>
        s = Constant<value_ints = [5, 1, 64]>()  z = Reshape(x, s)
        h = GRU<hidden_size = 8, linear_before_reset = 1>(z, u, r)  k = Conv(i, f) }"""
    text = text.replace("float[1,2,8,8] k", "float[1,2,6,6] k")
    _, result, _ = run(text, w=weight(K, N), u=weight(1, 24, K), r=weight(1, 24, 8), f=weight(2, 3, 3, 3))
    assert not result.modified
    assert [refusal.reason for refusal in result.refusals] == [
        "1 of Conv stay: its dynamic kernel runs at 0.2 to 0.3 of float's speed, static ones gain",
        "its 8 units are too few to gain: a step takes longer than its products save",
        "it is in a subgraph",
        "it is in a subgraph",
    ]


def test_opset_too_old(run):
    header = '<ir_version: 5, opset_import: ["": 9]>\n'
    _, result, _ = run(header + MATMUL, w=weight(K, N))
    assert reasons(result) == {"opset 9 has no DynamicQuantizeLinear; opset 11 is the first"}


@pytest.mark.parametrize(("flags", "largest"), [({"avx2"}, 64), ({"avx2", "avx512_vnni"}, 127)])
def test_range_is_reduced_where_sums_would_saturate(run, monkeypatch, flags, largest):
    monkeypatch.setattr(saturation, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(saturation.platform, "machine", lambda: "x86_64")
    graph, _, _ = run(MATMUL, w=weight(K, N))
    assert np.abs(graph.model.graph.initializers["w/quantized"].const_value.numpy()).max() == largest


class Samples(list):
    description = "made up"
    random = False


def test_smoothing_spares_activations_with_an_outlier_channel(context):
    text = "g (float[B,64] x) => (float[B,512] y) { y = MatMul(x, w) }"
    loud = np.where(np.arange(K) == 5, 100, 1).astype(np.float32)
    inputs = {"x": feed(16, K)["x"] * loud}
    found = {}
    for smooth in (0.0, 0.5, None):
        proto = onnx.parser.parse_model(HEADER + text)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight(K, N) / loud[:, None], "w"))
        graph = Graph.from_proto(proto)
        graph.infer()
        before = graph.clone()
        calibrated = dataclasses.replace(context(graph), calibration=Calibration(Samples([inputs])))
        result = QuantizeDynamic(smooth=smooth)(graph, calibrated)
        assert result.changes["MatMul quantized"] == 1
        found[smooth] = snr(before, graph, inputs)
    assert min(found[0.5], found[None]) > found[0.0] + 10


def test_smoothing_needs_calibration(run):
    with pytest.raises(RecipeError, match="smooth needs calibration data"):
        run(MATMUL, QuantizeDynamic(smooth=0.5), w=weight(K, N))


def test_options():
    with pytest.raises(RecipeError, match=r"smooth=1.5 is not between 0 and 1"):
        parse_pass("quantize-dynamic:smooth=1.5")
    text = "quantize-dynamic:smooth=0.5,keep=a+b,reduce_range=true"
    assert str(parse_pass(text)) == text
