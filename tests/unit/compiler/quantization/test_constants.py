from __future__ import annotations

import numpy as np
import pytest

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
