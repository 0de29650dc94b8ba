import pytest

from enginesmith.compiler.graph.precision import kept
from enginesmith.compiler.graph.selection import label
from enginesmith.errors import RecipeError
from enginesmith.passes.cast import Cast
from enginesmith.passes.pin import Pin

TEXT = """g (float[N,4] x) => (float[N,4] y) <float[4,4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}>
    { a = MatMul(x, w) b = Relu(a) y = MatMul(b, w) }"""


def test_marks_change_the_identity_and_are_heeded_by_casts(read, context):
    graph = read(TEXT)
    before = graph.fingerprint()
    result = Pin(keep=("b",))(graph, context(graph))
    assert result.modified
    assert result.changes == {"nodes pinned": 1}
    assert {label(node): kept(node) for node in graph.nodes()} == {"a": None, "b": "kept by choice: 'b'", "y": None}
    assert graph.fingerprint() != before
    refusals = Cast()(graph, context(graph)).refusals
    assert [(refusal.node, refusal.reason) for refusal in refusals if refusal.node] == [("b", "kept by choice: 'b'")]


def test_nothing_to_pin(read, context):
    graph = read(TEXT)
    assert not Pin()(graph, context(graph)).modified


def test_a_name_that_no_node_has(read, context):
    graph = read(TEXT)
    with pytest.raises(RecipeError, match="no node matches 'head'"):
        Pin(keep=("head",))(graph, context(graph))
