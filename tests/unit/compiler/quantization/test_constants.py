from __future__ import annotations

import numpy as np
import pytest

from enginesmith.compiler.graph import probe
from enginesmith.compiler.quantization.constants import Constants

TEXT = """g (float[2,2] x, bool c) => (float[2,2] y)
    <float[2,2] w = {1, 2, 3, 4}, int64[1] zero = {0}, int64[1] one = {1}, float s = {0.5}, int8[2] q = {2, 4}> {
    t = Transpose<perm = [1, 0]>(w)
    a = Slice(t, zero, one, zero)
    chain = Concat<axis = 0>(a, a)
    mixed = Add(chain, x)
    random = RandomNormalLike(w)
    dequantized = DequantizeLinear(q, s)
    branch = If (c) <then_branch = u () => (float[2,2] m) { m = Neg(w) }, else_branch = e () => (float[2,2] n)
        { n = Abs(w) }>
    y = Sum(mixed, random, branch, dequantized) }"""


@pytest.fixture
def values(read):
    graph = read(TEXT)
    found = {value.name: value for node in graph.nodes() for value in (*node.inputs, *node.outputs)}
    return Constants(graph), found


def test_chains_of_initializers_are_computed(values):
    constants, found = values
    np.testing.assert_array_equal(constants.array(found["w"]), [[1, 2], [3, 4]])
    np.testing.assert_array_equal(constants.array(found["chain"]), [[1, 3], [1, 3]])
    assert constants.array(found["chain"]) is constants.array(found["chain"])


@pytest.mark.parametrize("name", ["x", "mixed", "random", "dequantized", "branch", "m", "y"])
def test_what_is_not_constant(values, name):
    constants, found = values
    assert constants.array(found[name]) is None


def test_left_out_input(values):
    assert values[0].array(None) is None


def test_folding_takes_the_name_and_serves_all_readers(weighted):
    graph = weighted("""g (float[4,4] x, float[4,4] w) => (float[4,4] y, float[4,4] t) {
        t = Transpose(w)  s = Neg(w)  a = MatMul(x, s)  b = MatMul(a, s)  y = MatMul(b, t) }""")
    x = {"x": np.ones((4, 4), np.float32)}
    before = probe.run(graph, x)
    constants = Constants(graph)
    first, second, third = (node for node in graph.nodes() if node.op_type == "MatMul")
    assert constants.fold(first.inputs[1])
    assert first.inputs[1] is second.inputs[1] is graph.model.graph.initializers["s"]
    assert not constants.fold(first.inputs[1])
    assert not constants.fold(second.inputs[0])
    assert constants.fold(third.inputs[1])  # an output keeps its node and its name
    assert third.inputs[1].name == "t/folded"
    graph.verify()
    assert graph.operators() == {"Transpose": 1, "MatMul": 3}
    after = probe.run(graph, x)
    assert list(after) == ["y", "t"]
    for name in before:
        np.testing.assert_allclose(after[name], before[name], rtol=1e-5, atol=1e-5)
