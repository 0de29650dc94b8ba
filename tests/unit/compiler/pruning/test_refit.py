import numpy as np
import pytest

from enginesmith.compiler.dimensions import Dimensions
from enginesmith.compiler.dimensions.resize import resize
from enginesmith.compiler.graph import probe
from enginesmith.compiler.graph.editing import flattened
from enginesmith.compiler.pruning.refit import refit
from enginesmith.compiler.quantization.layers import as_layer

MLP = """g (float[N,16] x) => (float[N,4] y) <float[16,12] w, float[12] b, float[12,4] v, float[4] c> {
    [first] h = Gemm(x, w, b)  r = Relu(h)  [second] m = MatMul(r, v)  y = Add(m, c) }"""
GROUPED = """g (float[N,3,6,6] x) => (float[N,4,4,4] y) <float[12,3,3,3] w, float[4,6,3,3] v> {
    [first] h = Conv<pads = [1,1,1,1]>(x, w)  r = Relu(h)  [second] y = Conv<group = 2>(r, v) }"""


def layer_of(graph, name):
    return as_layer(next(node for node in graph.nodes() if node.name == name))


def pruned(graph, kept, name="first"):
    """A copy without the other positions of a dimension."""
    copy = flattened(graph)
    dimensions = Dimensions(copy)
    resize(dimensions, {next(g.dim for g in dimensions.groups if g.name == name): np.asarray(kept)})
    return copy


def error(before, after, samples):
    pairs = [(probe.run(before, s)["y"], probe.run(after, s)["y"]) for s in samples]
    return float(np.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((a**2).sum() for a, _ in pairs)))


def fitted(graph, after, samples, outputs=None):
    return refit(graph, after, outputs or {"second": np.arange(len(layer_of(graph, "second").load()))}, samples)


def test_linear_combinations_are_made_up_for(fill, calibrated):
    graph = fill(MLP.replace("r = Relu(h)", "r = Identity(h)"))
    layer = layer_of(graph, "first")
    weight = layer.load().copy()
    weight[8:] = np.random.default_rng(0).standard_normal((4, 8)) @ weight[:8]
    layer.store(weight.astype(np.float32))
    samples = list(calibrated(graph, batches=8).calibration.samples)
    after = pruned(graph, range(8))
    before_fit = error(graph, after, samples)
    fits, refusals = fitted(graph, after, samples)
    assert not refusals
    assert before_fit > 0.1
    assert error(graph, after, samples) < 1e-4
    (fit,) = fits
    assert fit.layer == "second"
    assert fit.after < 1e-8 < fit.before
    assert fit.record() == {"layer": "second", "before": fit.before, "after": fit.after}


def test_grouped_convolutions_are_fitted_by_group(fill, calibrated):
    graph = fill(GROUPED)
    layer = layer_of(graph, "first")
    weight = layer.load().copy()
    weight[4:6], weight[10:12] = weight[0:2], weight[6:8]
    layer.store(weight)
    samples = list(calibrated(graph).calibration.samples)
    name = next(g.name for g in Dimensions(graph).groups if g.size == 6 and g.of("reads"))
    after = pruned(graph, range(4), name)
    assert layer_of(after, "second").load().shape == (4, 4, 3, 3)
    assert error(graph, after, samples) > 0.1
    fitted(graph, after, samples)
    assert error(graph, after, samples) < 1e-3


def test_a_layer_whose_outputs_were_pruned_too(fill, calibrated):
    graph = fill("""g (float[N,16] x) => (float[N,4] y) <float[16,12] w, float[12,10] v, float[10,4] u> {
        [first] h = MatMul(x, w)  r = Relu(h)  [second] i = MatMul(r, v)  s = Relu(i)  [third] y = MatMul(s, u) }""")
    layer = layer_of(graph, "first")
    weight = layer.load().copy()
    weight[8:] = weight[:4]
    layer.store(weight)
    samples = list(calibrated(graph, batches=8).calibration.samples)
    after = pruned(pruned(graph, range(8)), [1, 2, 5, 7], "second")
    fits, _ = refit(graph, after, {"second": np.array([1, 2, 5, 7])}, samples)
    assert fits[0].after < 1e-8 < fits[0].before
    taps = [probe.Tapped(g, ["s"])(samples[0])["s"] for g in (graph, after)]
    np.testing.assert_allclose(taps[1], taps[0][:, [1, 2, 5, 7]], atol=1e-3)


@pytest.mark.parametrize("text", [MLP, MLP.replace("y = Add(m, c)", "y = Neg(m)"), GROUPED])
def test_a_fit_is_never_worse_than_none(fill, calibrated, text):
    graph = fill(text)
    samples = list(calibrated(graph, batches=12).calibration.samples)
    name = next(g.name for g in Dimensions(graph).groups if g.of("reads") and not g.why_not("shrink"))
    size = next(g.size for g in Dimensions(graph).groups if g.name == name)
    after = pruned(graph, range(size // 2), name)
    before_fit = error(graph, after, samples)
    (fit,), _ = fitted(graph, after, samples)
    assert fit.after <= fit.before
    assert error(graph, after, samples) < before_fit


def test_a_convolution_without_a_bias_gets_one_and_a_product_alone_gets_none(fill, calibrated):
    graph = fill(GROUPED)
    samples = list(calibrated(graph).calibration.samples)
    name = next(g.name for g in Dimensions(graph).groups if g.size == 6 and g.of("reads"))
    after = pruned(graph, range(4), name)
    fitted(graph, after, samples)
    assert len(next(n for n in after.nodes() if n.name == "second").inputs) == 3
    graph = fill(MLP.replace("y = Add(m, c)", "y = Neg(m)"))
    after = pruned(graph, range(8))
    fitted(graph, after, list(calibrated(graph).calibration.samples))
    assert after.operators() == graph.operators()


def test_a_bias_that_others_use_too_is_left_to_them(fill, calibrated):
    graph = fill(MLP.replace("y = Add(m, c)", "s = Add(m, c)  y = Mul(s, c)"))
    after = pruned(graph, range(8))
    fitted(graph, after, list(calibrated(graph).calibration.samples))
    kept = after.model.graph.initializers["c"].const_value.numpy()
    np.testing.assert_array_equal(kept, graph.model.graph.initializers["c"].const_value.numpy())


def reasons(result):
    return {refusal.node: refusal.reason for refusal in result[1]}


def test_shared_weights_are_not_fitted(fill, calibrated):
    graph = fill("""g (float[N,16] x) => (float[N,4] y) <float[16,12] w, float[12,4] v> {
        [first] h = MatMul(x, w)  r = Relu(h)  [second] a = MatMul(r, v)  s = Neg(r)  [third] b = MatMul(s, v)
        y = Add(a, b) }""")
    after = pruned(graph, range(8))
    found = fitted(graph, after, list(calibrated(graph).calibration.samples))
    assert reasons(found) == {"second": "not fitted: its weights are shared"}
    assert not found[0]


def test_layers_whose_groups_went_are_not_fitted(fill, calibrated):
    graph = fill("""g (float[N,3,6,6] x) => (float[N,4,4,4] y)
        <float[12,3,3,3] w, float[12,1,3,3] v, float[4,12,1,1] u> {
        [first] h = Conv<pads = [1,1,1,1]>(x, w)  [second] i = Conv<group = 12>(h, v)  [third] y = Conv(i, u) }""")
    after = pruned(graph, range(8))
    found = refit(graph, after, {"second": np.arange(8)}, list(calibrated(graph).calibration.samples))
    assert reasons(found) == {"second": "not fitted: its groups changed"}


def test_layers_that_are_none_are_not_fitted(fill, calibrated):
    graph = fill(MLP.replace("[second] m = MatMul(r, v)", '[second] m = Einsum<equation = "ni,io->no">(r, v)'))
    after = pruned(graph, range(8))
    found = refit(graph, after, {"second": np.arange(4)}, list(calibrated(graph).calibration.samples))
    assert reasons(found) == {"second": "not fitted: it is no Conv, Gemm or MatMul with constant float32 weights"}


def test_layers_that_lost_rows_are_not_fitted(fill, calibrated):
    """Heads stand in front of the channels that are read."""
    graph = fill("""g (float[N,6,16] x) => (float[N,6,3] y) <float[16,24] w, float[6,3] v> {
        [first] h = MatMul(x, w)  s = Constant<value_ints = [0,6,4,6]>()  r = Reshape(h, s)
        t = Transpose<perm = [0,2,1,3]>(r)  [second] m = MatMul(t, v)  y = ReduceMean<axes = [1], keepdims = 0>(m) }""")
    after = pruned(graph, [0, 2])
    found = fitted(graph, after, list(calibrated(graph).calibration.samples))
    assert reasons(found) == {"second": "not fitted: other axes of what it reads were pruned too"}


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_few_rows_are_not_fitted_on(fill, calibrated, rows):
    graph = fill(MLP)
    after = pruned(graph, range(8))
    samples = list(calibrated(graph, batches=1, size=rows).calibration.samples)
    found = fitted(graph, after, samples)
    assert reasons(found) == {"second": f"not fitted: {rows} rows of data are too few"}
    np.testing.assert_array_equal(layer_of(after, "second").load(), layer_of(graph, "second").load()[:, :8])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_not_fitted_on(fill, calibrated, value):
    graph = fill(MLP)
    after = pruned(graph, range(8))
    samples = [dict(s) for s in calibrated(graph).calibration.samples]
    samples[1]["x"] = np.full_like(samples[1]["x"], value)
    found = fitted(graph, after, samples)
    assert reasons(found) == {"second": "not fitted: what it reads or gives on the data is not finite"}
    np.testing.assert_array_equal(layer_of(after, "second").load(), layer_of(graph, "second").load()[:, :8])


def test_padded_tokens_do_not_count(fill, calibrated):
    """Tokens that fill up hold numbers that no fit can bear; without them, it is exact."""
    graph = fill("""g (float[N,6,16] x, int64[N,6] mask) => (float[N,6,4] y) <float[16,12] w, float[12,4] v> {
        [first] h = MatMul(x, w)  e = Mul(h, h)  [second] m = MatMul(e, v)  k = Cast<to = 1>(mask)
        a = Constant<value_ints = [2]>()  u = Unsqueeze(k, a)  y = Mul(m, u) }""")
    layer = layer_of(graph, "first")
    weight = layer.load().copy()
    weight[8:] = weight[:4]
    weight[8:, 0] += 5  # differs only where the first number is not 0, as in padded tokens
    layer.store(weight)
    samples = [dict(s) for s in calibrated(graph).calibration.samples]
    for sample in samples:
        sample["mask"][:, 0] = 1
        sample["x"][..., 0] = (1 - sample["mask"]) * 20
    after = pruned(graph, range(8))
    (fit,), _ = fitted(graph, after, samples)
    assert fit.after < 1e-6
    assert error(graph, after, samples) < 1e-3
    named = fill("""g (float[N,6,16] x, int64[N,6] types) => (float[N,6,4] y) <float[16,12] w, float[12,4] v> {
        [first] h = MatMul(x, w)  e = Mul(h, h)  [second] y = MatMul(e, v) }""")
    for name in ("first", "second"):
        layer_of(named, name).store(layer_of(graph, name).load())
    unmasked = [{"x": s["x"], "types": s["mask"]} for s in samples]
    (fit,), _ = fitted(named, pruned(named, range(8)), unmasked)
    assert fit.after > 1e-4
