import numpy as np

from enginesmith.compiler.graph import probe
from enginesmith.compiler.pruning.normalization import reestimate
from enginesmith.compiler.quantization.layers import as_layer

BN = """g (float[N,3,6,6] x) => (float[N,4,6,6] y)
    <float[4,3,1,1] w, float[4] scale, float[4] shift, float[4] mean, float[4] var = {0.5, 1, 2, 3}> {
    [conv] c = Conv(x, w)  [bn] y = BatchNormalization(c, scale, shift, mean, var) }"""


def scaled(graph, factor):
    copy = graph.clone()
    layer = as_layer(next(node for node in copy.nodes() if node.name == "conv"))
    layer.store(layer.load() * np.asarray(factor, np.float32).reshape(-1, 1, 1, 1))
    return copy


def test_channels_that_became_smaller_are_normalized_as_before(fill, calibrated):
    graph = fill(BN)
    samples = list(calibrated(graph).calibration.samples)
    changed = scaled(graph, [0.5, 2.0, 1.0, 3.0])
    counts = reestimate(graph, changed, {}, samples)
    assert counts == {"batch statistics taken anew": 1}
    for name in ("mean", "var"):  # both follow moments
        assert not np.allclose(*(g.model.graph.initializers[name].const_value.numpy() for g in (graph, changed)))
    stacked = [np.concatenate([probe.run(g, s)["y"] for s in samples]) for g in (graph, changed)]
    for statistic in (np.mean, np.var):
        before, after = (statistic(y, axis=(0, 2, 3)) for y in stacked)
        np.testing.assert_allclose(after, before, rtol=1e-2, atol=1e-2)


def test_a_graph_that_is_the_same_keeps_its_statistics(fill, calibrated):
    graph = fill(BN)
    same = graph.clone()
    reestimate(graph, same, {"bn": np.arange(4)}, list(calibrated(graph).calibration.samples))
    for name in ("mean", "var"):
        before, after = (g.model.graph.initializers[name].const_value.numpy() for g in (graph, same))
        np.testing.assert_allclose(after, before, rtol=1e-5)


def test_nothing_to_do_without_batch_normalization_or_in_half_precision(fill, read, calibrated):
    graph = fill("g (float[N,3,6,6] x) => (float[N,4,6,6] y) <float[4,3,1,1] w> { y = Conv(x, w) }")
    assert reestimate(graph, graph.clone(), {}, []) == {}
    half = read("""g (float16[N,2,4,4] x) => (float16[N,2,4,4] y)
        <float16[2] s = {1, 1}, float16[2] b = {0, 0}, float16[2] m = {0, 0}, float16[2] v = {1, 1}> {
        y = BatchNormalization(x, s, b, m, v) }""")
    assert reestimate(half, half.clone(), {}, []) == {}
