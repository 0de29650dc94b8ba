from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from enginesmith.compiler.calibration import Calibration
from enginesmith.compiler.quantization.onnxruntime import plan
from enginesmith.compiler.quantization.plan import Plan, Use
from enginesmith.compiler.quantization.ranges import activation_ranges, methods, unknown

NET = """g (float[N,4,8,8] x, float[4,4,1,1] w, float[256,4] v) => (float[N,4] y)
    { c = Conv(x, w) r = Relu(c) p = MaxPool<kernel_shape=[1,1]>(r) f = Flatten(p) y = Gemm(f, v) }"""


class Samples(list):
    description = "made up"
    random = False
    digest = "made up"


@pytest.fixture
def found(weighted):
    """A graph, its plan, and the statistics of the plan's activations."""

    def make(text: str):
        graph = weighted(text)
        shape = [d if isinstance(d, int) else 2 for d in graph.model.graph.inputs[0].shape]
        batches = [np.random.default_rng(seed).standard_normal(shape).astype(np.float32) for seed in range(2)]
        planned = plan(graph)
        statistics = Calibration(Samples({"x": batch} for batch in batches)).statistics(graph)
        return graph, planned, statistics

    return make


def test_products_keep_their_outliers_and_convolutions_clip_them(found):
    _, planned, _ = found(NET)
    assert methods(planned, "auto") == {"x": "mse", "r": "mse", "p": "mse", "f": "minmax"}
    assert set(methods(planned, "entropy").values()) == {"entropy"}


def test_a_group_takes_the_widest_of_its_ranges(found):
    _, planned, statistics = found(NET)
    parameters, table = activation_ranges(planned, statistics, "auto")
    assert len({float(parameters[name].scale) for name in "rpf"}) == 1
    rows = {limit.name: limit for limit in table}
    assert rows["f"].high == pytest.approx(statistics["f"].high, rel=1e-3)
    assert rows["r"].group == 3
    assert rows["x"].group == 1
    assert rows["x"].row()["method"] == "mse"


def test_what_is_padded_is_signed_where_it_is_balanced(found):
    _, planned, statistics = found(NET)
    plain, _ = activation_ranges(planned, statistics, "auto")
    signed, table = activation_ranges(dataclasses.replace(planned, padded=frozenset("xr")), statistics, "auto")
    assert (plain["x"].zero_point.dtype, signed["x"].zero_point.dtype) == (np.uint8, np.int8)
    assert signed["x"].zero_point == 0
    assert signed["x"].low <= plain["x"].low
    assert signed["r"].zero_point.dtype == np.uint8  # of a Relu
    assert {limit.name: limit.low for limit in table}["x"] == pytest.approx(float(signed["x"].low))


def test_little_is_clipped_of_what_batches_reach(found):
    _, planned, statistics = found(NET)
    tail = dataclasses.replace(statistics["x"], average_high=40.0)
    statistics = dataclasses.replace(statistics, tensors={**statistics, "x": tail})
    highs = [float(activation_ranges(planned, statistics, method)[0]["x"].high) for method in ("auto", "mse")]
    assert highs[0] == pytest.approx(32, rel=0.01)
    assert highs[1] < 5


def test_nodes_around_a_mask_are_told(found):
    text = """g (float[N,4] x, float[4,4] w) => (float[N,4] y) <float low = {-3.4e38}, float zero = {0}>
        { p = Greater(x, zero) m = Where(p, x, low) h = MatMul(m, w) y = Softmax(m) }"""
    graph, planned, statistics = found(text)
    assert [(node.outputs[0].name, reason) for node, reason in unknown(graph, planned, statistics).items()] == [
        ("h", "'m' holds a mask, NaN or infinite values on the data")
    ]


def test_a_node_that_gives_what_has_no_range_is_told(found):
    text = """g (float[N,4,8,8] x, float[4,4,1,1] w) => (float[N,4,8,8] y)
        { c = Conv(x, w) y = Clip(c) }"""
    graph, planned, statistics = found(text)
    reader, giver = (node for node in graph.nodes() if node.op_type in ("Clip", "Conv"))
    statistics = statistics.only(["x"])
    assert set(unknown(graph, planned, statistics)) == {reader, giver}
    skip = Plan({"c": frozenset({Use(reader, 0)})})  # the reader computes floats, and so does the giver
    assert set(unknown(graph, skip, statistics)) == {reader}
