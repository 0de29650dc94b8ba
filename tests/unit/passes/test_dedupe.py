from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enginesmith.compiler.graph import probe
from enginesmith.passes.dedupe import Dedupe

DEDUPE = Dedupe()
TWINS = """g (float[N,2] x) => (float[N,2] y) <float[2] v = {1, 2}, float[2] w = {1, 2}> {
    a = Add(x, v)  b = Add(x, w)  c = Relu(a)  d = Relu(b)  y = Mul(c, d) }"""


def test_merges_initializers_and_what_follows(rewrite, read):
    graph, result = rewrite(DEDUPE, TWINS)
    assert graph.operators() == {"Add": 1, "Relu": 1, "Mul": 1}
    assert list(graph.model.graph.initializers) == ["v"]
    assert result.changes == {"initializers merged": 1, "bytes saved": 8, "nodes merged": 2}
    inputs = {"x": np.float32([[1, -2], [3, -4]])}
    np.testing.assert_array_equal(probe.run(graph, inputs)["y"], probe.run(read(TWINS), inputs)["y"])


@pytest.mark.parametrize(
    "body",
    [
        "{ a = RandomNormal <shape = [2]> ()  b = RandomNormal <shape = [2]> ()  y = Sub(a, b) }",
        "{ a = Dropout(x)  b = Dropout(x)  y = Sub(a, b) }",
        "{ a = LeakyRelu <alpha = 0.1> (x)  b = LeakyRelu <alpha = 0.2> (x)  y = Sub(a, b) }",
        "{ a = Sub(x, z)  b = Sub(z, x)  y = Mul(a, b) }",
        "{ a = com.microsoft.Gelu(x)  b = com.microsoft.Gelu(x)  y = Sub(a, b) }",
        "{ a = local.noise(x)  b = local.noise(x)  y = Sub(a, b) }"
        '\n<domain: "local", opset_import: ["": 17]> noise (x) => (y) { y = RandomNormalLike(x) }',
        "<float[1] v = {1}, float w = {1}> { a = Add(x, v)  y = Add(a, w) }",
        "<float[2] v = {0, 1}, float[2] w = {-0.0, 1}> { a = Add(x, v)  y = Add(a, w) }",
    ],
)
def test_leaves_what_is_not_equal(rewrite, body):
    _, result = rewrite(DEDUPE, "g (float[2] x, float[2] z) => (float[2] y) " + body)
    assert not result.modified
    assert not result.refusals


def test_constants_and_functions_are_merged(rewrite):
    graph, _ = rewrite(
        DEDUPE,
        """g (float[2] x) => (float[2] y) {
            p = Constant <value = float {2.0}> ()  q = Constant <value = float {2.0}> ()
            a = local.scale(x, p)  b = local.scale(x, q)  y = Sub(a, b) }
        <domain: "local", opset_import: ["": 17]> scale (x, k) => (y) {
            a = Mul(x, k)  b = Mul(x, k)  y = Add(a, b) }""",
    )
    assert graph.operators() == {"Constant": 1, "local::scale": 1, "Sub": 1, "Mul": 1, "Add": 1}


def test_output_keeps_its_name(rewrite):
    graph, _ = rewrite(DEDUPE, "g (float[2] x) => (float[2] y, float[2] z) { a = Neg(x)  y = Neg(x)  z = Relu(a) }")
    assert graph.operators() == {"Neg": 1, "Relu": 1}
    assert graph.output_names == ("y", "z")


def test_refuses_two_outputs(rewrite):
    _, result = rewrite(DEDUPE, "g (float[2] x) => (float[2] y, float[2] z) { y = Neg(x)  z = Neg(x) }")
    assert not result.modified
    assert "both are outputs" in result.refusals[0].reason


def test_initializers_that_are_inputs_or_outputs_stay(rewrite):
    text = """g (float[2] x, float[2] v = {1, 2}) => (float[2] y, float[2] w)
        <float[2] w = {1, 2}, float[2] u = {1, 2}> {
        a = Add(x, v)  b = Add(a, w)  y = Add(b, u) }"""
    graph, _ = rewrite(DEDUPE, text)
    assert list(graph.model.graph.initializers) == ["v", "w"]
    assert graph.output_names == ("y", "w")


def test_subgraphs_use_what_lies_outside(rewrite, read):
    text = """g (float[2] x, bool c) => (float[2] y) <float[2] w = {1, 2}> { a = Add(x, w)
        b = If (c) <then_branch = t () => (float[2] p) <float[2] v = {1, 2}> { d = Add(x, v)  p = Relu(d) },
                    else_branch = e () => (float[2] q) { d2 = Neg(x)  q = Neg(x) }>
        y = Add(a, b) }"""
    graph, result = rewrite(DEDUPE, text)
    assert graph.operators() == {"Add": 2, "If": 1, "Relu": 1, "Neg": 1}
    assert result.changes["initializers merged"] == 1
    for c in (True, False):
        inputs = {"x": np.float32([3, -5]), "c": np.array(c)}
        np.testing.assert_array_equal(probe.run(graph, inputs)["y"], probe.run(read(text), inputs)["y"])


def test_branches_do_not_use_each_other(rewrite):
    text = """g (float[2] x, bool c) => (float[2] y) {
        y = If (c) <then_branch = t () => (float[2] p) { a = Neg(x)  p = Relu(a) },
                    else_branch = e () => (float[2] q) { b = Neg(x)  q = Abs(b) }> }"""
    assert not rewrite(DEDUPE, text)[1].modified


def test_result_of_a_branch_is_not_taken_from_outside(rewrite):
    text = """g (float[2] x, bool c) => (float[2] y) { a = Neg(x)
        b = If (c) <then_branch = t () => (float[2] p) { p = Neg(x) },
                    else_branch = e () => (float[2] q) { q = Abs(x) }>
        y = Add(a, b) }"""
    assert not rewrite(DEDUPE, text)[1].modified


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(["Add", "Sub", "Max"]), st.integers(0, 3), st.integers(0, 3)), min_size=2))
def test_any_graph_computes_the_same(read, rewrite, steps):
    lines = [f"v{i + 2} = {op}(v{min(a, i + 1)}, v{min(b, i + 1)})" for i, (op, a, b) in enumerate(steps)]
    total = f"y = Sum({', '.join(f'v{i}' for i in range(len(steps) + 2))})"
    text = f"g (float[N] v0, float[N] v1) => (float[N] y) {{ {'  '.join(lines)}  {total} }}"
    graph, _ = rewrite(DEDUPE, text)
    inputs = {"v0": np.float32([1, 2, 3]), "v1": np.float32([5, 7, -11])}
    np.testing.assert_array_equal(probe.run(graph, inputs)["y"], probe.run(read(text), inputs)["y"])
    distinct = {(node.op_type, tuple(node.inputs)) for node in graph.nodes()}
    assert len(distinct) == len(list(graph.nodes()))
