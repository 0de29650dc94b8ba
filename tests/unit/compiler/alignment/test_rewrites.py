from __future__ import annotations

import numpy as np
import pytest

from enginesmith.compiler.graph import Graph, probe
from enginesmith.passes.align import Align


def same(graph: Graph, change: Align, context) -> None:
    random = np.random.default_rng(0)
    inputs = {
        value.name: random.standard_normal([a if isinstance(a, int) else 3 for a in value.shape], dtype=np.float32)
        for value in graph.model.graph.inputs
    }
    before = probe.run(graph, inputs)
    assert change(graph, context(graph)).modified
    for name, array in probe.run(graph, inputs).items():
        assert array.shape == before[name].shape
        np.testing.assert_allclose(array, before[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "operators"),
    [
        ("[product] y = MatMul(x, w)", {"Reshape": 2, "MatMul": 1}),
        ("[product] h = MatMul(x, w)  y = Add(h, b)", {"Reshape": 2, "Gemm": 1}),
        ("[product] h = MatMul(x, w)  y = Add(b, h)", {"Reshape": 2, "Gemm": 1}),
        ("[product] h = MatMul(x, w)  r = Relu(h)  y = Add(r, h)", {"Reshape": 2, "MatMul": 1, "Relu": 1, "Add": 1}),
    ],
)
def test_products_of_three_axes_become_two_dimensional(fill, context, body, operators):
    graph = fill(f"g (float[N,5,8] x) => (float[N,5,16] y) <float[8,16] w, float[16] b> {{ {body} }}")
    same(graph, Align(flatten=True), context)
    assert graph.operators() == operators
    assert "product" in {node.name for node in graph.nodes()}


def test_nodes_without_a_name_are_flattened_and_aligned_alike(fill, context):
    graph = fill("g (float[N,5,8] x) => (float[N,5,31] y) <float[8,31] w> { y = MatMul(x, w) }")
    same(graph, Align(flatten=True, waste=1), context)
    assert graph.operators() == {"Reshape": 2, "MatMul": 1, "Slice": 1}
    assert "y" in {node.name for node in graph.nodes()}


def test_two_dynamic_axes_cannot_be_told_apart(fill, context):
    graph = fill("g (float[N,S,8] x) => (float[N,S,16] y) <float[8,16] w> { [product] y = MatMul(x, w) }")
    result = Align(flatten=True)(graph, context(graph))
    assert not result.modified
    assert ("product", "not flattened: more than one dynamic axis in x") in {
        (r.node, r.reason) for r in result.refusals
    }


def test_products_of_two_axes_stay(fill, context):
    graph = fill("g (float[N,8] x) => (float[N,16] y) <float[8,16] w> { y = MatMul(x, w) }")
    assert not Align(flatten=True)(graph, context(graph)).modified


STEM = "g (float[N,3,6,6] x) => (float[N,8,4,4] y) <float[8,3,3,3] w, float[8] b> { [stem] y = Conv(x, w, b) }"


def test_a_stem_gets_more_channels(fill, context):
    graph = fill(STEM)
    same(graph, Align(stem=4), context)
    assert graph.operators() == {"Pad": 1, "Conv": 1}
    shapes = {value.const_value.shape.numpy() for value in graph.model.graph.initializers.values()}
    assert (8, 4, 3, 3) in shapes


def test_a_stem_is_left_where_nothing_asks_or_it_has_enough(fill, context):
    assert not Align()(fill(STEM), context(fill(STEM))).modified
    assert not Align(stem=3)(fill(STEM), context(fill(STEM))).modified


def test_old_opsets_have_no_pad_with_inputs(fill, context):
    graph = fill('<ir_version: 8, opset_import: ["": 10]> ' + STEM)
    result = Align(stem=4)(graph, context(graph))
    assert "not padded: opset 10 has no Pad with inputs" in {refusal.reason for refusal in result.refusals}
