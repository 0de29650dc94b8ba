"""Tables of times, with a clock that counts multiply-adds: no test asserts on time."""

import pytest

from enginesmith.compiler.dimensions import Dimensions
from enginesmith.compiler.graph.cost import costs
from enginesmith.compiler.graph.editing import flattened
from enginesmith.compiler.pruning import latency
from enginesmith.compiler.pruning.cost import Macs
from enginesmith.compiler.pruning.latency import LEVELS, Latency, Stopwatch
from enginesmith.errors import RecipeError, TargetUnavailableError, UnknownNameError
from enginesmith.targets import parse_target
from enginesmith.targets.base import Availability

NET = """g (float[N,3,8,8] x) => (float[N,10] y)
    <float[16,3,3,3] w0, float[16] b0, float[16,16,3,3] w1, float[32,16,1,1] w2, float[32,16] v, float[16,10] u> {
    [stem] c0 = Conv<pads = [1,1,1,1]>(x, w0, b0)  r0 = Relu(c0)
    [same] c1 = Conv<pads = [1,1,1,1]>(r0, w1)  [wide] c2 = Conv(c1, w2)  p = GlobalAveragePool(c2)  f = Flatten(p)
    [hidden] h = Gemm(f, v)  r = Relu(h)  [head] y = MatMul(r, u) }"""
GROUPED = """g (float[N,16,8,8] x) => (float[N,8,6,6] y) <float[16,16,1,1] w0, float[16,8,3,3] w1, float[8,16,1,1] w2> {
    [first] c0 = Conv(x, w0)  [grouped] c1 = Conv<group = 2>(c0, w1)  [last] y = Conv(c1, w2) }"""


@pytest.fixture
def counted(monkeypatch):
    """Makes the clock count a millisecond for each thousand of multiply-adds. Gives the graphs that were timed."""
    timed = []

    def milliseconds(self, *graphs):
        timed.extend(graphs)
        return [1e-3 * sum(cost.macs or 0 for cost in costs(graph, {"N": 2}).values()) for graph in graphs]

    monkeypatch.setattr(Stopwatch, "milliseconds", milliseconds)
    return timed


@pytest.fixture
def table(fill, counted):
    """A table at batch 2, the multiply-adds that it is for, and its dimensions by name."""

    def make(text, target="onnxruntime-cpu"):
        graph = flattened(fill(text))
        dimensions = Dimensions(graph)
        macs = Macs(dimensions, costs(graph, {"N": 2}))
        dims = {g.name: g.dim for g in dimensions.groups if g.of("writes") and not g.why_not("shrink")}
        return Latency(graph, macs, dims.values(), target, {"N": 2}, lambda done: None), macs, dims

    return make


def test_the_table_follows_the_clock(table):
    found, macs, dims = table(NET)
    assert set(dims) == {"stem", "same", "wide", "hidden"}
    assert found.total({}) == pytest.approx(1e-3 * macs.total({}))
    for sizes in ({"stem": 8}, {"same": 4, "wide": 24}, {"stem": 12, "same": 12, "wide": 8, "hidden": 8}):
        chosen = {dims[name]: size for name, size in sizes.items()}
        saved = macs.total({}) - macs.total(chosen)
        assert found.total({}) - found.total(chosen) == pytest.approx(1e-3 * saved)


def test_what_a_dimension_takes_part_in(table):
    found, macs, dims = table(NET)
    whole = {dim: dim.size for dim in dims.values()}
    for dim in dims.values():
        saved = found.touched(dim, whole) - found.touched(dim, {**whole, dim: 8})
        assert saved == pytest.approx(1e-3 * (macs.total({}) - macs.total({dim: 8})))


def test_equal_layers_are_measured_once(table, counted):
    table("""g (float[N,8,8,8] x) => (float[N,4,8,8] y)
        <float[8,8,3,3] a, float[8,8,3,3] b, float[8,8,3,3] c, float[4,8,1,1] d> {
        [a] h0 = Conv<pads = [1,1,1,1]>(x, a)  [b] h1 = Conv<pads = [1,1,1,1]>(h0, b)
        [c] h2 = Conv<pads = [1,1,1,1]>(h1, c)  [d] y = Conv(h2, d) }""")
    assert len(counted) == 2 * len(LEVELS) ** 2 + 1


def test_layers_are_measured_at_the_batch_and_the_sizes_of_their_images(table, counted):
    table(NET)
    shapes = {tuple(graph.model.graph.inputs[0].shape) for graph in counted[:-1]}
    assert {(2, 3, 8, 8), (2, 16, 8, 8), (2, 4, 8, 8), (2, 32), (2, 8)} <= shapes
    for graph in counted:
        graph.verify()


def test_grouped_convolutions_stay_grouped(table, counted):
    _, _, dims = table(GROUPED)
    grouped = [g for g in counted[:-1] if any(n.attributes.get_int("group", 1) == 2 for n in g.nodes())]
    assert {g.model.graph.outputs[0].shape[1] for g in grouped} == {4, 8, 12, 16}
    assert {g.model.graph.inputs[0].shape[1] for g in grouped} == {4, 8, 12, 16}
    assert dims


def test_depthwise_convolutions_shrink_with_their_groups(table, counted):
    found, macs, dims = table("""g (float[N,3,8,8] x) => (float[N,4,8,8] y)
        <float[16,3,1,1] a, float[16,1,3,3] b, float[4,16,1,1] c> {
        [a] h0 = Conv(x, a)  [b] h1 = Conv<group = 16, pads = [1,1,1,1]>(h0, b)  [c] y = Conv(h1, c) }""")
    dim = dims["a"]
    saved = macs.total({}) - macs.total({dim: 8})
    assert found.total({}) - found.total({dim: 8}) == pytest.approx(1e-3 * saved)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_clock_that_runs(fill, batch):
    graph = flattened(fill(NET))
    stopwatch = Stopwatch(parse_target("onnxruntime-cpu"), {"N": batch})
    times = stopwatch.milliseconds(graph, graph.clone())
    assert len(times) == 2
    assert all(time > 0 for time in times)


def test_a_target_that_does_not_run_here(monkeypatch):
    target = parse_target("onnxruntime-cpu")
    missing = Availability(build=True, run=False, reason="no GPU", install="add one")
    monkeypatch.setattr(type(target), "availability", lambda self: missing)
    with pytest.raises(TargetUnavailableError, match="latency cannot be measured on onnxruntime-cpu: no GPU") as caught:
        Stopwatch(target, {})
    assert caught.value.hint == "add one"


def test_a_target_that_takes_no_graph():
    with pytest.raises(RecipeError, match="cannot be the goal of pruning on torch-inductor, which takes no graph"):
        Stopwatch(parse_target("torch-inductor"), {})


def test_options_of_the_target_are_joined_by_plus(table, monkeypatch):
    seen = []
    monkeypatch.setattr(latency, "parse_target", lambda text: seen.append(text) or parse_target("onnxruntime-cpu"))
    table(GROUPED, "onnxruntime-cpu:a=1+b=2")
    assert seen == ["onnxruntime-cpu:a=1,b=2"]


def test_a_target_that_is_none(table):
    with pytest.raises(UnknownNameError, match="unknown target 'nothing'"):
        table(GROUPED, "nothing")
