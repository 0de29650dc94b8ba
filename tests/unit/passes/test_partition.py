"""Where graphs are cut, and what the stages are."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from enginesmith.compiler.graph import Graph
from enginesmith.compiler.graph.identity import STAGE
from enginesmith.compiler.graph.selection import label
from enginesmith.compiler.partition.cost import _extra_ms
from enginesmith.compiler.partition.cut import Limits, choose
from enginesmith.compiler.partition.line import Crossing, Line, Weight
from enginesmith.compiler.partition.split import mark, marked, split
from enginesmith.compiler.signature import TensorSpec
from enginesmith.errors import BuildError, GraphError, RecipeError
from enginesmith.passes import parse_pass
from enginesmith.passes.partition import Partition

CHAIN = """g (float[N,64] x) => (float[N,64] y) <float[64,64] a, float[64,4] b, float[4,64] c, float[64,64] d>
    { h = MatMul(x, a) k = MatMul(h, b) l = MatMul(k, c) y = MatMul(l, d) }"""


def stages_of(graph):
    found = {}
    for node in graph.model.graph:
        found.setdefault(node.metadata_props.get(STAGE), []).append(label(node))
    return found


def whole(graph, feed):
    return ReferenceEvaluator(graph.to_proto()).run(None, feed)


def in_stages(graph, signature, feed):
    """The outputs by way of the stages, each run by onnx's reference."""
    values = dict(feed)
    for stage in split(graph, signature):
        stage.graph.verify()
        inputs = {spec.name: values[spec.name] for spec in stage.signature.inputs}
        names = [spec.name for spec in stage.signature.outputs]
        assert (stage.graph.input_names, stage.graph.output_names) == (tuple(inputs), tuple(names))
        values |= dict(zip(names, ReferenceEvaluator(stage.graph.to_proto()).run(names, inputs), strict=True))
    return [values[name] for name in graph.output_names]


def test_it_cuts_at_the_narrowest_tensor(fill, context):
    graph = fill(CHAIN)
    result = Partition(stages=2, slack=0.9)(graph, context(graph))
    assert stages_of(graph) == {"0": ["h", "k"], "1": ["l", "y"]}
    assert result.changes == {"stages": 2, "bytes that pass": 3 * 4 * 4}
    assert [row["sent"] for row in result.details["stages"]] == [["k"], []]
    assert result.details["times"] == "estimated by a roofline of nominal rates"


def test_balance_comes_before_bytes(fill, context):
    text = """g (float[64,64] x) => (float[64,64] y) <float[64,1] n, float[1,64] w, float[64,64] a>
        { p = MatMul(x, n) h = MatMul(p, w) i = MatMul(h, a) j = MatMul(i, a) k = MatMul(j, a) y = MatMul(k, a) }"""
    graph = fill(text)
    Partition(stages=2, slack=0.0)(graph, context(graph))
    assert stages_of(graph)["1"] == ["j", "k", "y"]
    wide = fill(text)
    Partition(stages=2, slack=0.99)(wide, context(wide))
    assert stages_of(wide)["1"] == ["h", "i", "j", "k", "y"]


def test_marks_count_and_a_second_run_changes_nothing(fill, context):
    graph = fill(CHAIN)
    before = graph.fingerprint()
    Partition(stages=2)(graph, context(graph))
    assert (marked(graph), graph.fingerprint() == before) == (2, False)
    assert not Partition(stages=2)(graph, context(graph)).modified
    Partition(stages=4)(graph, context(graph))
    assert marked(graph) == 4


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_stages_give_what_the_whole_gives(fill, context, stages):
    graph = fill(CHAIN)
    Partition(stages=stages)(graph, context(graph))
    feed = {"x": np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)}
    np.testing.assert_array_equal(in_stages(graph, context(graph).signature, feed)[0], whole(graph, feed)[0])


SKIPPING = """g (float[N,8] x) => (float[N,8] early, float[N,8] y) <float[8,8] w, float[8,8] v>
    { twice = Add(v, v) a = MatMul(x, w) early = Relu(a) b = MatMul(early, twice) c = MatMul(b, w) d = Add(c, a)
      e = MatMul(d, twice) y = Add(e, x) }"""


def test_what_skips_a_stage_is_taken_by_the_one_that_reads_it(fill, context):
    graph = fill(SKIPPING)
    for node in graph.model.graph:
        places = {"a": 0, "early": 0, "b": 1, "c": 1, "d": 2, "e": 2, "y": 2}
        if label(node) in places:
            mark(node, places[label(node)])
    signature = context(graph).signature
    found = [
        ([spec.name for spec in stage.signature.inputs], [spec.name for spec in stage.signature.outputs])
        for stage in split(graph, signature)
    ]
    assert found == [(["x"], ["a", "early"]), (["early"], ["c"]), (["c", "a", "x"], ["y"])]
    feed = {"x": np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)}
    for mine, theirs in zip(in_stages(graph, signature, feed), whole(graph, feed), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_constants_are_copied_to_each_stage_that_reads_them(fill, context):
    graph = fill(SKIPPING)
    Partition(stages=3)(graph, context(graph))
    assert stages_of(graph)[None] == ["twice"]
    held = [sorted(stage.graph.model.graph.initializers) for stage in split(graph, context(graph).signature)]
    assert sum("w" in names for names in held) > 1
    assert set().union(*held) == {"v", "w"}


def test_an_axis_that_varies_with_the_batch_keeps_its_range(read, context):
    graph = read("""g (float[N,2,4] x) => (float[M] y) <int64[1] flat = {-1}>
        { a = Relu(x) b = Reshape(a, flat) c = Neg(b) y = Exp(c) }""")
    for node, stage in zip(graph.model.graph, (0, 0, 1, 1), strict=True):
        mark(node, stage)
    signature = split(graph, context(graph).signature)[1].signature
    (spec,) = signature.inputs
    assert spec == TensorSpec("b", "float32", (spec.shape[0],))
    bounds = signature.axes[spec.shape[0]]
    assert (bounds.min, bounds.opt, bounds.max) == (8, 24, 64)


SHAPED = """g (float[N,4] x, float[N,8,2] z) => (float[N,8] y) <int64[1] eight = {8}, float[1,1] one = {1}>
    { n = Shape<start = 0, end = 1>(z) s = Concat<axis = 0>(n, eight) a = Relu(x) b = Neg(a) c = Expand(one, s)
      d = ReduceSum(b, axis) y = Mul(c, d) }"""


@pytest.mark.parametrize(("cut", "taken"), [("b", ["b", "c"]), ("d", ["c", "d"]), ("a", ["a"])])
def test_shapes_are_looked_at_again_and_do_not_pass(read, context, cut, taken):
    graph = read(SHAPED.replace("int64[1] eight", "int64[1] axis = {1}, int64[1] eight"))
    nodes = [node for node in graph.model.graph if label(node) in "abcdy"]
    order = [label(node) for node in nodes]
    for node in nodes:
        mark(node, int(order.index(label(node)) > order.index(cut)) if label(node) != "c" else int(cut == "a"))
    signature = context(graph).signature
    stages = split(graph, signature)
    assert [spec.name for spec in stages[1].signature.inputs] == taken
    feed = {"x": np.ones((3, 4), np.float32), "z": np.ones((3, 8, 2), np.float32)}
    np.testing.assert_array_equal(in_stages(graph, signature, feed)[0], whole(graph, feed)[0])


def test_a_whole_shape_takes_its_tensor_along(read, context):
    graph = read("""g (float[N,4] x, float[N,M] z) => (float[N,M] y) <int64[1] axis = {1}>
        { s = Shape(z) a = Relu(x) b = ReduceSum(a, axis) y = Expand(b, s) }""")
    assert Partition(stages=3)(graph, context(graph)).modified
    assert stages_of(graph)[None] == ["s"]
    signature = context(graph).signature
    assert [spec.name for spec in split(graph, signature)[2].signature.inputs] == ["b", "z"]
    feed = {"x": np.ones((3, 4), np.float32), "z": np.ones((3, 5), np.float32)}
    np.testing.assert_array_equal(in_stages(graph, signature, feed)[0], whole(graph, feed)[0])


def test_branches_stay_whole(read, context):
    graph = read("""g (float[N,4] x, bool[1] c) => (float[N,4] y)
        { a = Relu(x) b = If (c) <
            then_branch = t () => (float[N,4] p) { p0 = Neg(a) p = Exp(p0) },
            else_branch = e () => (float[N,4] q) { q = Relu(x) }
          > y = Neg(b) }""")
    result = Partition(stages=3)(graph, context(graph))
    assert [(r.reason, r.node) for r in result.refusals] == [("a node with branches or a body is not cut inside", "b")]
    feed = {"x": np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32), "c": np.array([True])}
    np.testing.assert_array_equal(in_stages(graph, context(graph).signature, feed)[0], whole(graph, feed)[0])


def test_more_stages_than_nodes(fill, context):
    graph = fill(CHAIN)
    with pytest.raises(GraphError, match=r"cannot be cut into 5 stages(.|\n)*at most 4 of 4 nodes"):
        Partition(stages=5)(graph, context(graph))


def test_no_cut_at_what_arrays_cannot_hold(read, context):
    graph = read("""g (float[N,4] x) => (float[N,4] y)
        { a = Cast<to=16>(x) b = Relu(a) y = Cast<to=1>(b) }""")
    with pytest.raises(GraphError, match="'a' is of bfloat16, which arrays cannot hold"):
        Partition(stages=2)(graph, context(graph))


def test_no_cut_at_what_only_running_tells(read, context):
    graph = read(
        """g (float[N] x) => (int64[M] y) { a = NonZero(x) f = int64[1]{-1} y = Reshape(a, f) }""".replace(
            "f = int64[1]{-1}", "f = Constant<value = int64[1] {-1}>()"
        )
    )
    with pytest.raises(GraphError, match="the shape of 'a' is known only when it runs"):
        Partition(stages=2)(graph, context(graph))


def test_a_graph_without_inputs_has_nothing_to_cut(read, context):
    graph = read("g (float[2] x) => (float[2] y) <float[2] w = {1,2}> { a = Relu(w) y = Neg(a) }")
    with pytest.raises(GraphError, match="cannot be cut into 3 stages"):
        Partition(stages=3)(graph, context(graph))


def test_memory_bounds_each_stage(fill, context):
    text = """g (float[4,512] x) => (float[4,512] y) <float[512,512] a, float[512,512] b, float[512,512] c>
        { h = MatMul(x, a) i = MatMul(h, b) y = MatMul(i, c) }"""
    graph = fill(text)
    Partition(stages=3, memory_mib=2)(graph, context(graph))
    assert marked(graph) == 3
    with pytest.raises(GraphError, match=r"no cut into 2 stages fits in memory(.|\n)*at most 2 MiB(.|\n)*found: 2 MiB"):
        Partition(stages=2, memory_mib=2)(fill(text), context(graph))


@pytest.mark.parametrize(
    ("text", "message"),
    [("partition:stages=1", "too few stages"), ("partition:slack=1", "slack of partition is no share")],
)
def test_options_that_make_no_sense(text, message):
    with pytest.raises(RecipeError, match=message):
        parse_pass(text)


def test_unmarked_and_backward_graphs_are_refused(fill, context):
    graph = fill(CHAIN)
    nodes = list(graph.model.graph)
    mark(nodes[0], 1)
    with pytest.raises(GraphError, match="node 'k' is in no stage"):
        split(graph, context(graph).signature)
    for node in nodes[1:]:
        mark(node, 0)
    with pytest.raises(GraphError, match="node 'k' of stage 0 reads 'h' of stage 1"):
        split(graph, context(graph).signature)


def wide(fill, context):
    """A graph whose nodes take longer than a microsecond, which would be no time, and its context."""
    graph = fill(CHAIN.replace("64", "512"))
    given = context(graph)
    outputs = (TensorSpec("y", "float32", ("N", 512)),)
    return graph, dataclasses.replace(given, signature=dataclasses.replace(given.signature, outputs=outputs))


def test_times_are_measured_where_a_target_runs(fill, context):
    graph, given = wide(fill, context)
    result = Partition(stages=2, on="onnxruntime-cpu:threads=1+spinning=false")(graph, given)
    assert result.details["times"].startswith("measured by ONNX Runtime")
    assert 1 <= result.details["cuts_timed"] <= 4
    assert not result.refusals


def test_stages_that_cannot_be_built_leave_the_first_cut(fill, context, monkeypatch):
    from enginesmith.passes import partition

    def measure(*place):
        def fail(pieces):
            raise BuildError("the builder hung")

        return fail

    monkeypatch.setattr(partition, "measure_on", measure)
    graph, given = wide(fill, context)
    result = Partition(stages=2, on="onnxruntime-cpu")(graph, given)
    assert result.refusals[-1].reason == "no stages were built and timed: the builder hung"
    assert result.details["cuts_timed"] == 0
    assert marked(graph) == 2


def test_times_are_estimated_where_none_runs(fill, context, monkeypatch):
    from enginesmith.targets.base import Availability
    from enginesmith.targets.onnxruntime_cpu import OnnxRuntimeCpu

    monkeypatch.setattr(OnnxRuntimeCpu, "availability", lambda self: Availability(False, False, "it is missing"))
    graph = fill(CHAIN)
    result = Partition(stages=2, on="onnxruntime-cpu")(graph, context(graph))
    assert [refusal.reason for refusal in result.refusals] == ["the nodes' times are estimates: it is missing"]
    assert "this machine's roofline" in result.details["times"]


def lines():
    """Random lines: of each tensor where it is made and last read, and its bytes; times; weights."""

    @st.composite
    def draw(draw):
        count = draw(st.integers(2, 7))
        crossings = []
        for place in range(-1, count):
            last = draw(st.integers(max(place, 0), count - 1))
            crossings.append(Crossing(f"t{place}", place, last, draw(st.integers(0, 9)), ""))
        weights = [
            Weight(draw(st.integers(1, 9)), tuple(sorted(draw(st.sets(st.integers(0, count - 1), min_size=1)))))
            for _ in range(draw(st.integers(0, 3)))
        ]
        line = Line(tuple(map(str, range(count))), tuple(crossings), tuple(weights))
        return line, [draw(st.integers(0, 9)) for _ in range(count)], draw(st.integers(2, count))

    return draw()


def brute_force(line, times, stages, memory, slack):
    """All cuts: the fewest bytes, within the slack; None where none fits."""

    def sent(place):
        return sum(c.size_bytes for c in line.crossings if c.first < place <= c.last)

    def held(first, end):
        weights = sum(w.size_bytes for w in line.weights if any(first <= place < end for place in w.places))
        alive = (sum(c.size_bytes for c in line.crossings if max(c.first, 0) <= k <= c.last) for k in range(first, end))
        return weights + max(alive)

    cuts = []
    for places in itertools.combinations(range(1, len(line)), stages - 1):
        pieces = list(itertools.pairwise([0, *places, len(line)]))
        if memory is None or all(held(*piece) <= memory for piece in pieces):
            cuts.append((max(sum(times[a:b]) for a, b in pieces), sum(map(sent, places))))
    if not cuts:
        return None
    least = min(cut[0] for cut in cuts)
    return min(cut[1] for cut in cuts if cut[0] <= least * (1 + slack) + 1e-12), least


@settings(max_examples=150, deadline=None)
@given(lines(), st.sampled_from([None, 12, 25, 40]), st.sampled_from([0.0, 0.3]))
def test_no_cut_is_better(case, memory, slack):
    line, times, stages = case
    expected = brute_force(line, times, stages, memory, slack)
    limits = Limits(memory_bytes=memory, slack=slack)
    if expected is None:
        with pytest.raises(GraphError, match="fits in memory"):
            choose(line, times, stages, limits)
        return
    pieces = choose(line, times, stages, limits)
    assert sum(piece.sent_bytes for piece in pieces) == expected[0]
    assert max(piece.ms for piece in pieces) <= expected[1] * (1 + slack) + 1e-9
    assert memory is None or all(piece.memory_bytes <= memory for piece in pieces)


def test_what_is_fused_is_cut_only_where_nothing_else_is_left():
    crossings = tuple(Crossing(f"t{place}", place, place + 1, 4, "") for place in range(3))
    line = Line(("a", "b", "c", "d"), crossings, ())
    limits = Limits(slack=0.0, avoided=frozenset((1, 2)))
    assert [piece.nodes for piece in choose(line, [5, 5, 5, 5], 2, limits)] == [(0, 3), (3, 4)]
    assert [piece.nodes for piece in choose(line, [5, 5, 5, 5], 3, limits)] != []


@st.composite
def dags(draw):
    """Random graphs of float[N,4] tensors: any node reads any tensors before it; some weights are shared."""
    body, made = [], ["x", "z"]
    for number in range(draw(st.integers(2, 9))):
        name = f"t{number}"
        first, second = draw(st.sampled_from(made)), draw(st.sampled_from(made))
        kind = draw(st.sampled_from(["Relu({0})", "Add({0}, {1})", "MatMul({0}, w)", "MatMul({0}, u)", "Mul({0}, k)"]))
        body.append(f"{name} = {kind.format(first, second)}")
        made.append(name)
    outputs = [
        name for name in made if name not in ("x", "z") and not any(f"({name}" in b or f", {name})" in b for b in body)
    ]
    extra = draw(st.sampled_from(made[2:]))
    outputs += [extra] if extra not in outputs else []
    declared = ", ".join(f"float[N,4] {name}" for name in outputs)
    text = f"g (float[N,4] x, float[N,4] z) => ({declared}) <float[4,4] w, float[4,4] v>"
    return f"{text} {{ k = Constant<value_float = 0.5>() u = Add(v, w) {' '.join(body)} }}"


@settings(max_examples=40, deadline=None)
@given(dags(), st.integers(2, 4))
def test_random_graphs_in_stages_give_what_the_whole_gives(fill, context, text, stages):
    graph: Graph = fill(text)
    try:
        Partition(stages=stages)(graph, context(graph))
    except GraphError:  # too few nodes: see `test_more_stages_than_nodes`
        assume(False)
    random = np.random.default_rng(0)
    feed = {name: random.standard_normal((3, 4)).astype(np.float32) for name in ("x", "z")}
    feed = {name: feed[name] for name in graph.input_names}
    for mine, theirs in zip(in_stages(graph, context(graph).signature, feed), whole(graph, feed), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_what_the_profiler_adds_is_taken_off_again():
    assert _extra_ms([3.0, 1.0, 2.0], 3.0) == pytest.approx(1.0)
    assert _extra_ms([4.0, 0.5, 0.5], 3.0) == pytest.approx(1.0)  # no layer takes less than nothing
    assert _extra_ms([1.0, 1.0], 3.0) == 0.0


def test_passing_counts_where_it_takes_longer_than_a_stage():
    crossings = (Crossing("wide", 1, 2, 8000, ""), Crossing("narrow", 2, 3, 1, ""))
    line = Line(("a", "b", "c", "d"), crossings, ())
    assert [p.nodes for p in choose(line, [1, 1, 1, 1], 2, Limits(slack=0.0))] == [(0, 2), (2, 4)]
    slow = Limits(slack=0.0, link_bytes_ms=1000.0)
    assert [p.nodes for p in choose(line, [1, 1, 1, 1], 2, slow)] == [(0, 1), (1, 4)]
