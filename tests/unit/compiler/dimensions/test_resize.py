"""What resizing does to numbers: groups that were found wrong mix up channels, and show."""

import runpy
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enginesmith.compiler.dimensions import Dimensions
from enginesmith.compiler.dimensions.layout import positions
from enginesmith.compiler.dimensions.resize import resize
from enginesmith.compiler.graph import probe

helpers = runpy.run_path(str(Path(__file__).with_name("graphs.py")))
GRAPHS, build, find = helpers["GRAPHS"], helpers["build"], helpers["find"]
NORMALIZED = {"group norm"}


def inputs_of(graph):
    generator = np.random.default_rng(1)
    shapes = {v.name: [a if isinstance(a, int) else 3 for a in v.shape] for v in graph.model.graph.inputs}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def outputs_of(graph):
    graph.verify()
    (output,) = probe.run(graph, inputs_of(graph)).values()
    return output


def close(found, expected):
    return found.shape == expected.shape and np.allclose(found, expected, rtol=1e-4, atol=1e-4)


def shrinkable(dimensions):
    return [group for group in dimensions.groups if not group.why_not("shrink")]


@pytest.mark.parametrize("name", GRAPHS)
def test_another_order_of_positions_changes_nothing(name):
    graph = build(GRAPHS[name])
    expected = outputs_of(graph)
    dimensions = Dimensions(graph)
    groups = shrinkable(dimensions)
    assert groups
    resize(dimensions, {g.dim: np.roll(np.arange(g.size), 1) for g in groups})
    assert close(outputs_of(graph), expected)


@pytest.mark.parametrize("name", GRAPHS)
def test_new_positions_change_nothing(name):
    graph = build(GRAPHS[name])
    expected = outputs_of(graph)
    dimensions = Dimensions(graph)
    groups = [group for group in dimensions.groups if not group.why_not("grow")]
    assert groups
    resize(dimensions, {g.dim: np.append(np.arange(g.size), [-1] * 3) for g in groups})
    assert close(outputs_of(graph), expected)


@pytest.mark.parametrize("name", [name for name in GRAPHS if name not in NORMALIZED])
@settings(max_examples=5, deadline=None)
@given(st.data())
def test_positions_that_are_zero_may_go(name, data):
    graph = build(GRAPHS[name])
    dimensions = Dimensions(graph)
    chosen = {}
    for group in shrinkable(dimensions):
        kept = data.draw(st.sets(st.integers(0, group.size - 1), min_size=1, max_size=group.size))
        chosen[group.dim] = np.array(sorted(kept))
    for group in dimensions.groups:
        for member in (*group.of("writes"), *group.of("follows")) if group.dim in chosen else ():
            array = member.value.const_value.numpy().copy()
            gone = np.setdiff1d(np.arange(array.shape[member.axis]), positions(member.term, chosen))
            np.moveaxis(array, member.axis, 0)[gone] = 0
            member.value.const_value = ir.Tensor(array, name=member.value.name)
    expected = outputs_of(graph)
    resize(dimensions, chosen)
    assert close(outputs_of(graph), expected)
    assert {g.size for g in Dimensions(graph).groups if g.of("writes")} <= {
        len(chosen.get(g.dim, range(g.size))) for g in dimensions.groups
    }


def test_nothing_chosen_changes_nothing():
    graph = build(GRAPHS["computed shapes"])
    before = graph.fingerprint()
    assert resize(Dimensions(graph), {}) == {}
    assert graph.fingerprint() == before


def test_what_was_taken_is_told_by_constant_and_axis():
    dimensions = Dimensions(build(GRAPHS["conv"]))
    group = find(dimensions, "w1", 0)
    taken = resize(dimensions, {group.dim: np.array([1, 4])})
    assert {str(member): places.tolist() for member, places in taken.items()} == {
        "w1:0": [1, 4],
        "b1:0": [1, 4],
        "w2:1": [1, 4],
    }


def test_a_vector_that_two_layers_share_becomes_two():
    text = """g (float[n,4] x, float[4,6] w1, float[6] b1, float[6,6] w2, float[6,5] w3) => (float[n,5] y) {
        a = MatMul(x, w1)  c = Add(a, b1)  d = MatMul(c, w2)  e = Add(d, b1)  y = MatMul(e, w3) }"""
    graph = build(text)
    dimensions = Dimensions(graph)
    resize(dimensions, {find(dimensions, "w1", 1).dim: np.array([0, 5])})
    shapes = {name: value.const_value.shape.numpy() for name, value in graph.model.graph.initializers.items()}
    assert (shapes["b1"], shapes["w2"]) == ((6,), (2, 6))
    assert [shape for name, shape in shapes.items() if name.startswith("b1/")] == [(2,)]
    assert outputs_of(graph).shape == (3, 5)


def test_a_shape_whose_heads_lie_in_the_batch_is_scaled():
    graph = build(GRAPHS["heads in the batch"])
    dimensions = Dimensions(graph)
    heads = next(group for group in dimensions.groups if group.size == 2 and group.of("writes"))
    resize(dimensions, {heads.dim: np.array([1])})
    graph.infer()
    assert outputs_of(graph).shape == (3, 3, 8)
    assert graph.operators()["Div"] == 1


def test_new_positions_of_a_quantized_weight_are_its_zero():
    text = """g (float[n,3,4,4] x, uint8[4,3,1,1] w1, float[5,4,1,1] w2) => (float[n,5,4,4] y)
        <float s = {0.1}, uint8 z = {7}> { f = DequantizeLinear(w1, s, z)  a = Conv(x, f)  y = Conv(a, w2) }"""
    graph = build(text)
    expected = outputs_of(graph)
    dimensions = Dimensions(graph)
    resize(dimensions, {find(dimensions, "w1", 0).dim: np.array([0, 1, 2, 3, -1])})
    assert graph.model.graph.initializers["w1"].const_value.numpy()[4].tolist() == [[[7]], [[7]], [[7]]]
    assert close(outputs_of(graph), expected)
