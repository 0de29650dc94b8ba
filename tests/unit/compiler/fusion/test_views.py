"""Heads that are split off and joined again."""

from __future__ import annotations

import pytest

from enginesmith.compiler.fusion.views import drop_undone

GRAPH = """g (float[B,S,8] x) => (float[B,S,8] y)
    <int64[4] split = {0, 0, 2, 4}, int64[3] join = {0, 0, 8}, int64[3] swapped = {0, 8, -1}> { BODY }"""


def test_a_reshape_that_undoes_another_goes_and_the_name_stays(read):
    graph = read(GRAPH.replace("BODY", "n = Neg(x)  h = Reshape(n, split)  j = Reshape(h, join)  y = Abs(j)"))
    drop_undone(graph)
    graph.verify()
    assert graph.operators() == {"Neg": 1, "Abs": 1}
    assert [node.outputs[0].name for node in graph.nodes()] == ["j", "y"]


@pytest.mark.parametrize(
    "body",
    [
        "n = Neg(x)  h = Reshape(n, split)  j = Reshape(h, swapped)  y = Abs(j)",
        "n = Neg(x)  h = Reshape(n, split)  y = Reshape(h, join)",
        "h = Reshape(x, split)  j = Reshape(h, join)  y = Abs(j)",
        "n = Neg(x)  h = Reshape(n, split)  a = Abs(h)  y = Reshape(a, join)",
    ],
    ids=["another shape", "an output", "an input", "something between"],
)
def test_what_stays(read, body):
    graph = read(GRAPH.replace("BODY", body))
    before = [(node.op_type, *(value.name for value in node.inputs)) for node in graph.nodes()]
    drop_undone(graph)
    assert [(node.op_type, *(value.name for value in node.inputs)) for node in graph.nodes()] == before
