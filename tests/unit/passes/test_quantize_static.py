from __future__ import annotations

import collections
import dataclasses
import itertools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from enginesmith.compiler.calibration import Calibration
from enginesmith.compiler.graph import Graph, probe
from enginesmith.compiler.graph.editing import is_constant
from enginesmith.compiler.quantization import saturation
from enginesmith.compiler.quantization.fused import unfused
from enginesmith.compiler.quantization.layers import initializer
from enginesmith.errors import RecipeError
from enginesmith.passes import parse_pass
from enginesmith.passes import quantize_static as module
from enginesmith.passes.quantize_static import QuantizeStatic

STATIC = QuantizeStatic()
RESIDUAL = """
g (float[N,3,16,16] x, float[16,3,3,3] w0, float[16] b0, float[16,16,3,3] w1, float[16] b1, float[16,16,3,3] w2,
   float[16,10] w3, float[10] b3) => (float[N,10] y)
{
  c0 = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w0, b0)
  r0 = Relu(c0)
  p0 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r0)
  c1 = Conv<pads=[1,1,1,1]>(p0, w1, b1)
  r1 = Relu(c1)
  c2 = Conv<pads=[1,1,1,1]>(r1, w2)
  s = Add(c2, p0)
  r2 = Relu(s)
  a = ReduceMean<axes=[2,3], keepdims=0>(r2)
  y = Gemm(a, w3, b3)
}
"""
MLP = """
g (float[N,5,32] x, float[32,64] w1, float[64] b1, float[64,32] w2, float[32] b2) => (float[N,5,32] y)
{
  h = MatMul(x, w1)
  a = Add(h, b1)
  e = Erf(a)
  m = MatMul(e, w2)
  y = Add(m, b2)
}
"""


class Samples(list):
    description = "made up"
    random = False
    digest = "made up"


@pytest.fixture
def build(read, context):
    """A graph whose inputs but for the first become weights, and a context with calibration on batches of the first."""

    def make(text: str, batches=None, scale: float = 1.0) -> tuple[Graph, object, Samples]:
        graph = read(text)
        generator = np.random.default_rng(0)
        main = graph.model.graph
        for value in list(main.inputs)[1:]:
            shape = tuple(value.shape)
            fan = max(1.0, np.prod(shape[1:]) if len(shape) > 2 else shape[0])
            array = (generator.standard_normal(shape) / np.sqrt(fan) * scale).astype(np.float32)
            main.inputs.remove(value)
            value.const_value = ir.Tensor(array, name=value.name)
            main.register_initializer(value)
        graph.infer()
        (x,) = main.inputs
        size = [d if isinstance(d, int) else 4 for d in x.shape]
        batches = batches or [generator.standard_normal(size).astype(np.float32) for _ in range(4)]
        samples = Samples({"x": batch} for batch in batches)
        calibrated = dataclasses.replace(context(graph), calibration=Calibration(samples))
        return graph, calibrated, samples

    return make


def optimized(graph: Graph, tmp_path) -> onnx.GraphProto:
    """What ONNX Runtime's optimizer makes of a graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(graph.to_proto().SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(tmp_path / "optimized.onnx").graph


def operators(graph: onnx.GraphProto) -> dict[str, int]:
    return dict(collections.Counter(node.op_type for node in graph.node))


def snr_db(before: Graph, after: Graph, samples) -> float:
    pairs = [(probe.run(before, s)["y"], probe.run(after, s)["y"]) for s in samples]
    return 10 * np.log10(sum((a**2).sum() for a, _ in pairs) / sum(((a - b) ** 2).sum() for a, b in pairs))


def reasons(result) -> dict[str, str]:
    return {refusal.node: refusal.reason for refusal in result.refusals}


def scales(graph: Graph) -> dict[str, float]:
    """The scale of each quantized activation."""
    nodes = [n for n in graph.nodes() if n.op_type == "QuantizeLinear"]
    return {n.inputs[0].name: float(n.inputs[1].const_value.numpy()) for n in nodes}


def test_a_residual_network_is_fused_end_to_end(build, tmp_path):
    graph, context, samples = build(RESIDUAL)
    before = graph.clone()
    result = STATIC(graph, context)
    found = optimized(graph, tmp_path)
    kernels = operators(found)
    for moving in ("Flatten", "Reshape", "Transpose"):
        kernels.pop(moving, None)
    assert kernels == {
        "QuantizeLinear": 1,
        "QLinearConv": 3,
        "NhwcMaxPool": 1,
        "QLinearAdd": 1,
        "QLinearGlobalAveragePool": 1,
        "QGemm": 1,
    }
    assert unfused(found) == []
    assert snr_db(before, graph, samples) > 30
    assert reasons(result) == {}
    assert result.changes["weights quantized"] == 4


def test_products_of_three_dimensions_are_fused_beside_their_biases(build, tmp_path):
    graph, context, samples = build(MLP)
    before = graph.clone()
    STATIC(graph, context)
    found = optimized(graph, tmp_path)
    assert operators(found) == {"QuantizeLinear": 2, "MatMulIntegerToFloat": 2, "Add": 2, "Erf": 1}
    assert unfused(found) == []
    assert snr_db(before, graph, samples) > 30


def test_the_same_products_with_known_sizes_are_fused_too(build, tmp_path):
    graph, context, _ = build(MLP.replace("[N,", "[4,"))
    STATIC(graph, context)
    assert unfused(optimized(graph, tmp_path)) == []


@pytest.mark.parametrize(
    ("options", "least_db"),
    [
        ({"method": "minmax"}, 30),
        ({"method": "entropy"}, 20),
        ({"method": "percentile"}, 25),
        ({"method": "moving-average"}, 30),
        ({"search": True}, 30),
        ({"rounding": "gptq"}, 30),
        ({"equalize": True}, 30),
        ({"bias_correction": False}, 30),
        ({"reduce_range": True}, 25),
        ({"per_channel": False}, 25),
        ({"smooth": 0.5}, 30),
    ],
)
def test_every_switch_gives_a_graph_that_is_fused(build, tmp_path, options, least_db):
    graph, context, samples = build(RESIDUAL)
    before = graph.clone()
    QuantizeStatic(**options)(graph, context)
    assert unfused(optimized(graph, tmp_path)) == []
    assert snr_db(before, graph, samples) > least_db


def test_gptq_leaves_less_error_than_nearest(build):
    found = []
    for rounding in ("nearest", "gptq"):
        graph, context, samples = build(MLP)
        before = graph.clone()
        QuantizeStatic(rounding=rounding)(graph, context)
        found.append(snr_db(before, graph, samples))
    assert found[1] > found[0]


def test_the_table_tells_the_limits(build):
    graph, context, _ = build(RESIDUAL)
    result = STATIC(graph, context)
    rows = {row["name"]: row for row in result.details["limits"]}
    assert rows.keys() == scales(graph).keys()
    for name, scale in scales(graph).items():
        row = rows[name]
        assert row["scale"] == pytest.approx(scale)
        assert (row["high"] - row["low"]) / 255 == pytest.approx(scale, rel=1e-5)
        assert 0 <= row["clipped"] < 0.05
    assert rows["r1"]["low"] == 0
    assert rows["r0"]["group"] == rows["p0"]["group"] == 2
    assert rows["r0"]["scale"] == rows["p0"]["scale"]
    assert result.details["samples"] == 16
    assert len(result.details["statistics"]) == 64
    assert isinstance(result.details["findings"], list)


def test_a_quantized_graph_is_kept(build):
    graph, context, _ = build(RESIDUAL)
    STATIC(graph, context)
    again = STATIC(graph, dataclasses.replace(context, calibration=None))
    assert not again.modified
    (refusal,) = again.refusals
    assert refusal.reason.startswith("the graph is quantized already (")


def test_calibration_is_asked_for(build):
    graph, context, _ = build(RESIDUAL)
    with pytest.raises(RecipeError, match=r"quantize-static needs calibration data.*\n.*give --data with 32"):
        STATIC(graph, dataclasses.replace(context, calibration=None))


@pytest.mark.parametrize(
    ("opset", "options", "reason"),
    [
        (12, {}, "one scale for each channel needs opset 13, the graph has 12: export for a newer one, or choose"),
        (9, {"per_channel": False}, "QuantizeLinear needs opset 10, the graph has 9: export for a newer one"),
        (17, {"scheme": "tensorrt", "dtype": "fp8"}, "FP8 needs opset 19, the graph has 17: export for a newer one"),
    ],
)
def test_an_old_opset_is_refused(build, opset, options, reason):
    text = "g (float[N,4,8,8] x, float[4,4,1,1] w) => (float[N,4,8,8] y) { y = Conv(x, w) }"
    graph, context, _ = build(f'<ir_version: 8, opset_import: ["": {opset}]>\n{text}')
    result = QuantizeStatic(**options)(graph, context)
    assert not result.modified
    assert result.refusals[0].reason.startswith(reason)


def test_one_scale_a_weight_works_at_opset_12(build, tmp_path):
    graph, context, samples = build('<ir_version: 8, opset_import: ["": 12]>\n' + RESIDUAL)
    before = graph.clone()
    QuantizeStatic(per_channel=False)(graph, context)
    assert unfused(optimized(graph, tmp_path)) == []
    assert snr_db(before, graph, samples) > 25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp8"}, "ONNX Runtime has no FP8 kernels: dtype=fp8 needs scheme=tensorrt"),
        ({"smooth": 1.5}, "smooth=1.5 is not between 0 and 1"),
        ({"attention": True}, "attention=true needs scheme=tensorrt"),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QuantizeStatic(**options)


def test_options_are_text():
    text = "quantize-static:method=minmax,rounding=gptq,smooth=0.5,keep=head+*/norm"
    rule = parse_pass(text)
    assert rule == QuantizeStatic(method="minmax", rounding="gptq", smooth=0.5, keep=("head", "*/norm"))
    assert str(rule) == text


@pytest.mark.parametrize("pattern", ["y", "m*"])
def test_nodes_are_kept_by_name(build, pattern):
    text = "g (float[N,8] x, float[8,8] w, float[8,8] v) => (float[N,8] y) { m = MatMul(x, w) y = MatMul(m, v) }"
    graph, context, _ = build(text)
    result = QuantizeStatic(keep=(pattern,))(graph, context)
    kept = pattern.removesuffix("*")
    assert reasons(result) == {kept: f"kept by choice: {pattern!r}"}
    (node,) = (n for n in graph.nodes() if n.op_type == "MatMul")
    assert node.outputs[0].name == kept
    assert is_constant(node.inputs[1])


def test_a_name_that_no_node_has_is_an_error(build):
    graph, context, _ = build(MLP)
    with pytest.raises(RecipeError, match="no node matches 'attention'"):
        QuantizeStatic(keep=("attention",))(graph, context)


def test_a_mask_and_what_reads_it_stay_float(build):
    text = """g (float[N,4] x, float[4,4] w, float[4,4] v) => (float[N,4] y) <float low = {-3.4e38}, float zero = {0}>
        { p = Greater(x, zero) m = Where(p, x, low) a = MatMul(m, w) b = Softmax(m) y = MatMul(b, v) }"""
    graph, context, _ = build(text)
    result = STATIC(graph, context)
    assert reasons(result) == {"a": "'m' holds a mask, NaN or infinite values on the data"}
    assert scales(graph).keys() == {"b"}


def test_broken_weights_stay(build):
    graph, context, _ = build(MLP.replace("y = Add(m, b2)", "b = Add(m, b2) y = Tanh(b)"))
    weight = graph.model.graph.initializers["w2"]
    array = weight.const_value.numpy().copy()
    array[0, 0] = np.inf
    weight.const_value = ir.Tensor(array, name="w2")
    result = STATIC(graph, context)
    assert reasons(result)["m"] == "its weight 'w2' holds NaN or Inf"
    assert result.changes["weights quantized"] == 1


def test_constant_activations_have_a_scale(build):
    graph, context, samples = build(RESIDUAL, batches=[np.zeros((2, 3, 16, 16), np.float32)] * 2)
    before = graph.clone()
    STATIC(graph, context)
    assert min(scales(graph).values()) > 1e-30
    assert snr_db(before, graph, samples) > 30


def test_a_bias_beyond_int32_widens_its_weight(build, tmp_path):
    graph, context, samples = build(RESIDUAL)
    weight, bias = (graph.model.graph.initializers[name] for name in ("w1", "b1"))
    weight.const_value = ir.Tensor(weight.const_value.numpy() * 1e-9, name="w1")
    bias.const_value = ir.Tensor(np.full(16, 3, np.float32), name="b1")
    before = graph.clone()
    STATIC(graph, context)
    assert unfused(optimized(graph, tmp_path)) == []
    assert snr_db(before, graph, samples) > 30


def test_a_bias_that_correction_makes_overflow_widens_its_weight(build, monkeypatch):
    graph, context, _ = build("g (float[N,4,6,6] x, float[4,4,3,3] w) => (float[N,4,4,4] y) { y = Conv(x, w) }")

    def correct(work, *_):
        (node,) = work.model.graph
        node.resize_inputs(3)
        node.replace_input_with(2, initializer(work, "shift", np.full(4, -1e8, np.float32)))
        return {}, []

    monkeypatch.setattr(module, "correct", correct)
    QuantizeStatic(bias_correction=True)(graph, context)
    bias = graph.model.graph.initializers["shift/quantized"].const_value.numpy()
    assert -(2**31) < bias.min() <= bias.max() < -(2**28)


def test_what_is_left_open_is_tried_and_the_best_is_kept(build):
    text = "g (float[N,4,6,6] x, float[4,4,3,3] w) => (float[N,4,4,4] y) { y = Conv(x, w) }"
    graph, context, samples = build(text)
    before, errors = graph.clone(), {}
    for method, correction in itertools.product(module.TRIED["method"], module.TRIED["bias_correction"]):
        work = before.clone()
        QuantizeStatic(method=method, bias_correction=correction)(work, context)
        errors[f"method={method},bias_correction={str(correction).lower()}"] = snr_db(before, work, samples)
    trials = STATIC(graph, context).details["trials"]
    assert {trial["options"]: trial["snr_db"] for trial in trials} == pytest.approx(
        errors, abs=0.5
    )  # of the first batches
    (kept,) = [trial for trial in trials if trial["kept"]]
    assert kept["snr_db"] >= max(trial["snr_db"] for trial in trials) - 0.3
    assert snr_db(before, graph, samples) == pytest.approx(errors[kept["options"]])


def test_what_is_given_is_not_tried(build):
    text = "g (float[N,4,6,6] x, float[4,4,3,3] w) => (float[N,4,4,4] y) { y = Conv(x, w) }"
    graph, context, _ = build(text)
    assert QuantizeStatic(method="entropy", bias_correction=False)(graph, context).details["trials"] == []


LARGE = """
g (float[N,32,8,8] x, float[16,32,3,3] w, float[32] b, float[32,16,1,1] v, float[32,32,3,3] u) => (float[N,32,8,8] y)
    { c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) d = Conv(r, v, b) y = Conv<pads=[1,1,1,1]>(d, u) }"""


def test_large_convolutions_get_a_zero_point_that_asks_for_amx(build, monkeypatch):
    found = {}
    for amx in (False, True):
        monkeypatch.setattr(module, "multiplies_tiles", lambda amx=amx: amx)
        graph, context, samples = build(LARGE)
        QuantizeStatic(method="minmax", bias_correction=False)(graph, context)
        constants = {name: value.const_value.numpy() for name, value in graph.model.graph.initializers.items()}
        assert {name: constants[f"{name}/zero_point"].min() for name in "wvu"} == {"w": -amx, "v": 0, "u": -amx}
        assert constants["w/quantized"].min() >= -127 - amx
        found[amx] = probe.run(graph, samples[0])["y"]
    np.testing.assert_array_equal(found[True], found[False])


WIDE = """g (float[N,32] x, float[32,32] w, float[32,32] v) => (float[N,32] y)
    { m = MatMul(x, w) a = Abs(m) l = Log(a) y = MatMul(l, v) }"""


def wide(spread: float) -> list[np.ndarray]:
    """Batches of samples whose sizes lie as many powers of ten apart."""
    generator = np.random.default_rng(3)
    sizes = 10 ** generator.uniform(-spread, 0, (6, 64, 1))
    return list((sizes * generator.standard_normal((6, 64, 32))).astype(np.float32))


def test_first_layers_stay_float_where_the_budget_asks_for_it(build):
    graph, context, samples = build(WIDE, wide(3))
    before, quantized = graph.clone(), graph.clone()
    assert QuantizeStatic(first_float=False)(quantized, context).refusals == ()
    result = STATIC(graph, context)
    assert {r.node: r.reason for r in result.refusals} == {"m": "first_float leaves the first layers float"}
    *others, last = result.details["trials"]
    assert last["kept"]
    assert "first_float=true" in last["options"]
    assert not any(trial["kept"] for trial in others)
    assert snr_db(before, graph, samples) > snr_db(before, quantized, samples) + 3


def test_first_layers_are_not_tried_within_the_budget(build):
    graph, context, _ = build(MLP)
    result = STATIC(graph, context)
    assert result.refusals == ()
    assert not any("first_float" in trial["options"] for trial in result.details["trials"])


def test_first_layers_stay_float_on_demand_where_there_are_others(build):
    graph, context, _ = build(MLP)
    result = QuantizeStatic(method="minmax", bias_correction=False, first_float=True)(graph, context)
    assert [refusal.reason for refusal in result.refusals] == ["first_float leaves the first layers float"]
    graph, context, _ = build("g (float[N,8] x, float[8,8] w) => (float[N,8] y) { y = MatMul(x, w) }")
    assert QuantizeStatic(first_float=True)(graph, context).refusals == ()


def test_gptq_says_what_it_rounds_to_nearest(build):
    text = """g (float[N,8] x, float[8,8] w, float[8,8] v) => (float[N,8] y)
        { a = MatMul(x, w) e = Erf(a) b = MatMul(e, w) f = Erf(b) y = MatMul(f, v) }"""
    graph, context, samples = build(text, [np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)])
    before = graph.clone()
    result = QuantizeStatic(rounding="gptq")(graph, context)
    assert reasons(result) == dict.fromkeys(("a", "b"), "rounded to nearest: its weights are shared")
    nearest = before.clone()
    STATIC(nearest, context)
    assert snr_db(before, graph, samples) > snr_db(before, nearest, samples)


LOUD = """g (float[N,32] x, float[32] s, float[32] b, float[32,32] w, float[32,32] v) => (float[N,32] y)
    { n = LayerNormalization(x, s, b) m = MatMul(n, w) e = Erf(m) y = MatMul(e, v) }"""


def loud(graph: Graph) -> None:
    """Makes one channel of the normalization a hundred times louder, and its weights as much weaker."""
    scale, weight = (graph.model.graph.initializers[name] for name in ("s", "w"))
    factor = np.where(np.arange(32) == 5, 100, 1).astype(np.float32)
    scale.const_value = ir.Tensor(factor, name="s")
    weight.const_value = ir.Tensor(weight.const_value.numpy() / factor[:, None], name="w")


def test_outlier_channels_are_smoothed_where_nobody_chose(build):
    found = {}
    for smooth in (None, 0.0):
        graph, context, samples = build(LOUD)
        loud(graph)
        before = graph.clone()
        result = QuantizeStatic(smooth=smooth, first_float=False)(graph, context)
        assert result.changes.get("inputs smoothed", 0) == (smooth is None)
        assert result.refusals == ()
        found[smooth] = snr_db(before, graph, samples)
    assert found[None] > found[0.0] + 10


@pytest.mark.parametrize("options", [{"scheme": "tensorrt", "dtype": "fp8"}, {"scheme": "tensorrt"}])
def test_fp8_is_not_smoothed_unasked_and_tensorrt_takes_no_mul(build, options):
    text = '<ir_version: 9, opset_import: ["": 19]>\n' + LOUD.replace("m = MatMul", "a = Abs(n) m = MatMul")
    graph, context, _ = build(text)
    loud(graph)
    result = QuantizeStatic(**options)(graph, context)
    assert result.modified
    assert graph.operators()["Mul"] == 0
    assert not any("smoothed" in change for change in result.changes)


def test_convolutional_graphs_are_not_smoothed_unasked(build):
    graph, context, _ = build(RESIDUAL)
    STATIC(graph, context)
    (statistics,) = context.calibration.collected
    assert statistics.samples == 16


def test_layers_that_share_a_weight_share_it_still(build):
    text = """g (float[N,8,4,4] x, float[8,8,3,3] w) => (float[N,8,4,4] y)
        { a = Conv<pads=[1,1,1,1]>(x, w) r = Relu(a) y = Conv<pads=[1,1,1,1]>(r, w) }"""
    graph, context, samples = build(text)
    before = graph.clone()
    result = STATIC(graph, context)
    stored = [v for v in graph.model.graph.initializers.values() if v.dtype == ir.DataType.INT8 and len(v.shape) == 4]
    assert len(stored) == 1
    assert result.changes["weights quantized"] == 2
    assert snr_db(before, graph, samples) > 30


def test_products_of_activations_and_branches_are_refused(build):
    text = """g (float[N,4,4] x, float[4,4] w) => (float[N,4,4] y) <bool c = {1}> {
        t = Transpose<perm=[0,2,1]>(x)
        a = MatMul(x, t)
        b = MatMul(a, w)
        y = If(c) <then_branch = t () => (float[N,4,4] d) { d = MatMul(b, w) },
                   else_branch = e () => (float[N,4,4] f) { f = Neg(b) }> }"""
    graph, context, _ = build(text)
    result = STATIC(graph, context)
    assert reasons(result) == {"a": "both operands are activations", "y": "the bodies of If stay float"}
    assert result.changes["weights quantized"] == 1


def test_a_graph_with_nothing_to_quantize_is_left_alone(build):
    graph, context, _ = build("g (float[N,4] x) => (float[N,4] y) { y = Erf(x) }")
    assert not STATIC(graph, context).modified


def test_constant_nodes_and_functions_are_seen_through(build):
    text = """<ir_version: 8, opset_import: ["": 17, "local": 1]>
        g (float[N,4] x) => (float[N,4] y) { y = local.f(x) }
        <opset_import: ["": 17], domain: "local"> f (a) => (b)
        { w = Constant<value = float[4,2] {1,2,3,4,5,6,7,8}>() v = Constant<value = float[2,4] {1,2,3,4,5,6,7,8}>()
          h = MatMul(a, w) b = MatMul(h, v) }"""
    graph, context, samples = build(text)
    before = graph.clone()
    result = STATIC(graph, context)
    assert result.changes["weights quantized"] == 2
    assert snr_db(before, graph, samples) > 30


def test_weights_that_nodes_compute_are_folded(build):
    text = """g (float[N,4] x, float[6,4] w) => (float[N,6] y) { t = Transpose(w) y = MatMul(x, t) }"""
    graph, context, samples = build(text)
    before = graph.clone()
    assert STATIC(graph, context).changes["weights quantized"] == 1
    assert graph.operators()["Transpose"] == 0
    assert snr_db(before, graph, samples) > 30


def test_a_dense_block_is_fused_with_its_normalization(build, tmp_path):
    text = """g (float[N,8,8,8] x, float[8,8,3,3] w, float[8,16,3,3] v, float[16] m, float[16] b, float[8] c)
        => (float[N,8,8,8] y) <float[16] s = {1,2,3,4,5,6,7,8,1,2,3,4,5,6,7,8}> {
        h = Conv<pads=[1,1,1,1]>(x, w)
        r = Relu(h)
        k = Conv<pads=[1,1,1,1]>(r, w)
        j = Concat<axis=1>(r, k)
        n = BatchNormalization(j, s, b, m, s)
        q = Relu(n)
        y = Conv<pads=[1,1,1,1]>(q, v, c) }"""
    graph, context, samples = build(text)
    before = graph.clone()
    assert STATIC(graph, context).changes["BatchNormalization to Conv"] == 1
    found = optimized(graph, tmp_path)
    kernels = operators(found)
    assert kernels.pop("Transpose") == 2
    assert kernels == {"QuantizeLinear": 1, "QLinearConv": 4, "QLinearConcat": 1, "DequantizeLinear": 1}
    assert snr_db(before, graph, samples) > 30


@pytest.mark.parametrize(("flags", "largest"), [({"avx512_vnni"}, 127), ({"avx2"}, 64)])
def test_weights_have_seven_bits_where_sums_would_saturate(build, monkeypatch, flags, largest):
    monkeypatch.setattr(saturation, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(saturation.platform, "machine", lambda: "x86_64")
    graph, context, _ = build(MLP)
    STATIC(graph, context)
    weights = [v.const_value.numpy() for v in graph.model.graph.initializers.values() if v.dtype == ir.DataType.INT8]
    assert max(np.abs(w.astype(np.int32)).max() for w in weights) == largest
