import numpy as np
import pytest

from enginesmith.compiler.dimensions import Dimensions
from enginesmith.compiler.graph import probe
from enginesmith.compiler.pruning.importance import DAMPING, Ranking, by_moments, by_weights
from enginesmith.compiler.pruning.readers import readers, with_moments
from enginesmith.compiler.quantization.bias import add_to_bias
from enginesmith.compiler.quantization.layers import as_layer

MLP = """g (float[N,16] x) => (float[N,4] y) <float[16,12] w, float[12,4] v> {
    [first] h = Gemm(x, w)  r = Relu(h)  [second] y = MatMul(r, v) }"""
CONV = """g (float[N,3,6,6] x) => (float[N,4,4,4] y) <float[12,3,3,3] w, float[4,12,3,3] v> {
    [first] h = Conv<pads = [1,1,1,1]>(x, w)  r = Relu(h)  [second] y = Conv(r, v) }"""
GROUPED = """g (float[N,3,6,6] x) => (float[N,4,4,4] y) <float[12,3,3,3] w, float[4,6,3,3] v> {
    [first] h = Conv<pads = [1,1,1,1]>(x, w)  r = Relu(h)  [second] y = Conv<group = 2>(r, v) }"""
TWICE = """g (float[N,5,16] x) => (float[N,5,4] y) <float[16,8] w, float[16,4] v> {
    [first] h = MatMul(x, w)  n = Neg(h)  both = Concat<axis = -1>(h, n)  [second] y = MatMul(both, v) }"""
BESIDE = """g (float[N,16] x) => (float[N,4] y) <float[16,8] w, float[16,6] u, float[14,4] v> { [first] h = MatMul(x, w)
    [other] k = MatMul(x, u)  both = Concat<axis = -1>(h, k)  [second] y = MatMul(both, v) }"""


def weights_of(graph, name):
    return as_layer(next(node for node in graph.nodes() if node.name == name))


def group_of(graph, name="first"):
    return next(group for group in Dimensions(graph).groups if group.name == name)


def ranked(graph, calibrated, method, *, step=1, name="first"):
    samples = list(calibrated(graph).calibration.samples)
    group = group_of(graph, name)
    ((_, own),) = with_moments(graph, [group], samples)
    return by_moments(group, own, method, step=step)


def made_redundant(graph, pairs):
    """Makes the second of each pair of positions a copy of the first."""
    layer = weights_of(graph, "first")
    weight = layer.load().copy()
    for original, copy in pairs:
        weight[copy] = weight[original]
    layer.store(weight)


def test_norms_of_what_makes_a_position(fill):
    graph = fill(MLP)
    weight = weights_of(graph, "first").load().astype(float)
    for method, norms in (("l1", np.abs(weight).sum(1)), ("l2", np.square(weight).sum(1))):
        ranking = by_weights(group_of(graph), method)
        assert ranking.order.tolist() == np.argsort(norms).tolist()
        np.testing.assert_allclose(ranking.loss, np.concatenate([[0], np.cumsum(np.sort(norms)) / norms.sum()]))


def test_what_stays_is_in_its_old_order():
    assert Ranking(np.array([2, 0, 3, 1]), np.zeros(5)).kept(2).tolist() == [1, 3]


def test_activation_and_hessian_are_shares_of_what_the_reader_gives(fill, calibrated):
    graph = fill(MLP)
    x = np.concatenate([s["x"] for s in calibrated(graph).calibration.samples]).astype(float)
    read = np.maximum(x @ weights_of(graph, "first").load().T, 0)
    weight = weights_of(graph, "second").load().astype(float)
    share = np.square(read).sum(0) * np.square(weight).sum(0) / np.square(read @ weight.T).sum()
    for method in ("activation", "hessian"):  # the same, where each position is one input
        ranking = ranked(graph, calibrated, method)
        assert ranking.order.tolist() == np.argsort(share).tolist()
        np.testing.assert_allclose(ranking.loss[1:], np.cumsum(np.sort(share)), rtol=1e-3)


def test_hessian_looks_at_the_places_of_a_kernel_together(fill, calibrated):
    """A kernel of opposite signs over a channel that is alike everywhere gives nothing."""
    graph = fill(CONV)
    first, second = weights_of(graph, "first"), weights_of(graph, "second")
    weight = first.load().copy()
    weight[5] = 0
    first.store(weight)
    bias = np.zeros(12, np.float32)
    bias[5] = 3
    assert add_to_bias(graph, first, bias) is None
    kernel = second.load().copy()
    kernel[:, 5] = [[1, -1, 0], [-1, 1, 0], [0, 0, 0]]
    second.store(kernel)
    assert ranked(graph, calibrated, "hessian").order[0] == 5
    assert ranked(graph, calibrated, "activation").order[0] != 5


@pytest.mark.parametrize("text", [MLP, CONV, GROUPED], ids=["mlp", "conv", "grouped"])
@pytest.mark.parametrize("step", [1, 3, 4, 8])
def test_one_of_two_equal_positions_goes_first_and_never_both(fill, calibrated, text, step):
    graph = fill(text)
    group = group_of(graph)
    pairs = [(0, 3), (1, 4), (2, 5)]
    made_redundant(graph, pairs)
    if text == GROUPED:  # six positions that stand in two groups each
        made_redundant(graph, [(a + 6, b + 6) for a, b in pairs])
        group = next(g for g in Dimensions(graph).groups if g.size == 6 and g.of("reads"))
    ranking = ranked(graph, calibrated, "obs", step=step, name=group.name)
    gone = set(ranking.order[:3].tolist())
    assert all(len(gone & set(pair)) == 1 for pair in pairs)
    assert ranking.loss[3] < 0.2 * ranking.loss[4]


def test_obs_tells_what_is_lost_when_the_rest_makes_up_for_it(fill, calibrated):
    graph = fill(MLP)
    ranking = ranked(graph, calibrated, "obs")
    (reader,) = readers(group_of(graph))
    samples = calibrated(graph).calibration.samples
    read = np.concatenate([probe.Tapped(graph, ["r"])(s)["r"] for s in samples]).astype(float)
    weight = reader.weight[0].astype(float)
    moment = read.T @ read
    damped = moment + DAMPING * np.diag(moment).mean() * np.eye(12)
    for count in (1, 4, 11):
        kept = ranking.kept(12 - count)
        cross = weight @ damped[:, kept]
        fitted = np.linalg.solve(damped[np.ix_(kept, kept)], cross.T).T
        lost = np.trace(weight @ damped @ weight.T) - np.trace(fitted @ cross.T)
        assert ranking.loss[count] == pytest.approx(lost / np.trace(weight @ moment @ weight.T), rel=1e-3)


def test_all_positions_go_once(fill, calibrated):
    for step in (1, 5, 12, 50):
        ranking = ranked(fill(MLP), calibrated, "obs", step=step)
        assert sorted(ranking.order) == list(range(12))
        assert (np.diff(ranking.loss) >= -1e-12).all()


def test_a_reader_that_reads_a_position_twice(fill, calibrated):
    graph = fill(TWICE)
    (reader,) = readers(group_of(graph))
    assert reader.owner.tolist() == [*range(8), *range(8)]
    for method in ("activation", "hessian", "obs"):
        assert sorted(ranked(graph, calibrated, method).order) == list(range(8))
    weight = weights_of(graph, "second")
    halves = weight.load().copy()
    halves[:, 8 + 2] = halves[:, 2]  # what comes once as it is and once negated cancels
    weight.store(halves)
    assert ranked(graph, calibrated, "obs").order[0] == 2
    assert ranked(graph, calibrated, "hessian").order[0] == 2


def test_inputs_of_other_dimensions_make_up_too(fill, calibrated):
    graph = fill(BESIDE)
    first, other = weights_of(graph, "first"), weights_of(graph, "other")
    weight = first.load().copy()
    weight[3] = other.load()[1]
    first.store(weight / np.linalg.norm(weight, axis=1, keepdims=True))
    reading = weights_of(graph, "second")
    reading.store(np.sign(reading.load()))
    (reader,) = readers(group_of(graph))
    assert reader.owner.tolist() == [*range(8), *[-1] * 6]
    ranking = ranked(graph, calibrated, "obs")
    assert ranking.order[0] == 3
    assert ranking.loss[1] < 0.4 * (ranking.loss[2] - ranking.loss[1])


@pytest.mark.parametrize("method", ["activation", "hessian", "obs"])
def test_a_reader_that_gives_nothing_loses_nothing(fill, calibrated, method):
    graph = fill(MLP)
    layer = weights_of(graph, "first")
    layer.store(np.zeros_like(layer.load()))
    assert ranked(graph, calibrated, method).loss.tolist() == [0.0] * 13


def test_dead_positions_cost_almost_nothing(fill, calibrated):
    graph = fill(MLP)
    layer = weights_of(graph, "first")
    weight = layer.load().copy()
    weight[[2, 7]] = 0
    layer.store(weight)
    for method in ("activation", "hessian", "obs"):
        ranking = ranked(graph, calibrated, method)
        assert set(ranking.order[:2]) == {2, 7}
        assert ranking.loss[2] < 1e-2 * ranking.loss[-1]
