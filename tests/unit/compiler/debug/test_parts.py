from __future__ import annotations

import numpy as np
import pytest

from enginesmith.compiler.debug.parts import MADE, UNQUANTIZED, alive, part, prepared, segments
from enginesmith.compiler.debug.runtimes import plainly
from enginesmith.errors import GraphError

CHAIN = """
g (float[N, 2] x) => (float[N, 2] y) <float two = {2}> {
  a = Mul(x, two)
  b = Neg(a)
  c = Exp(b)
  y = Add(c, a)
}
"""


def test_a_part_takes_tensors_from_inside_and_gives_others(read) -> None:
    a = np.array([[0.0, 1.0]], np.float32)
    graph = part(read(CHAIN), {"a": a}, ["c"])
    assert graph.input_names == ("a",)
    assert [node.op_type for node in graph.nodes()] == ["Neg", "Exp"]
    np.testing.assert_allclose(plainly(graph, {"a": a})["c"], np.exp(-a), rtol=1e-6)


def test_a_tensor_that_is_taken_and_given_is_given_as_it_is_made(read) -> None:
    given = {"x": np.ones((1, 2), np.float32), "a": np.zeros((1, 2), np.float32)}
    graph = part(read(CHAIN), given, ["a", "b"])
    found = plainly(graph, given)
    assert found[f"a{MADE}"].tolist() == [[2, 2]]
    assert found["b"].tolist() == [[0, 0]]


def test_a_weight_can_be_taken(read) -> None:
    given = {"x": np.ones((1, 2), np.float32), "two": np.array(5, np.float32)}
    assert plainly(part(read(CHAIN), given, ["a"]), given)["a"].tolist() == [[5, 5]]


def test_the_graph_stays_as_it_is(read) -> None:
    graph = read(CHAIN)
    before = graph.fingerprint()
    part(graph, {"a": np.zeros((1, 2), np.float32)}, ["c", "b"])
    assert graph.fingerprint() == before


def test_a_tensor_that_is_not_there_is_an_error(read) -> None:
    with pytest.raises(GraphError, match="no tensor 'z'"):
        part(read(CHAIN), {"x": np.zeros((1, 2), np.float32)}, ["z"])


def test_branches_read_what_is_taken(read) -> None:
    graph = read(
        """
        g (float[2] x, bool c) => (float[2] z) {
          a = Neg(x)
          y = If (c) <then_branch = t () => (float[2] p) { p = Exp(a) },
                      else_branch = e () => (float[2] q) { q = Abs(a) }>
          z = Sqrt(y)
        }
        """
    )
    (found,) = (s for s in segments(graph, {"a", "y", "x", "c"}) if s.name == "y")
    assert sorted(found.leaves) == ["a", "c"]
    given = {"a": np.array([1, 2], np.float32), "c": np.array(True)}
    assert part(graph, given, ["y"]).input_names == ("c", "a")
    after = part(graph, {"y": given["a"]}, ["z"])
    assert [node.op_type for node in after.nodes()] == ["Sqrt"]  # the branches' uses of a do not keep it
    assert after.input_names == ("y",)
    np.testing.assert_allclose(plainly(part(graph, given, ["y"]), given)["y"], np.exp([1, 2]), rtol=1e-6)


def test_bfloat16_goes_in_and_out_as_float32(read) -> None:
    graph = read("g (float[2] x) => (float[2] y) { a = Cast<to = 16>(x)  b = Identity(a)  y = Cast<to = 1>(b) }")
    x = np.array([1.0, 1.001], np.float32)
    assert plainly(part(graph, {"x": x}, ["a"]), {"x": x})["a"].tolist() == [1, 1]
    assert plainly(part(graph, {"a": x}, ["b"]), {"a": x})["b"].tolist() == [1, 1]


def test_a_segment_reaches_back_to_what_both_graphs_hold(read) -> None:
    graph = read(
        """
        g (float[2] x) => (float[2] y) <float w = {2}> {
          x16 = Cast<to = 10>(x)
          w16 = Cast<to = 10>(w)
          a = Mul(x16, w16)
          b = Neg(a)
          y = Cast<to = 1>(b)
        }
        """
    )
    first, second = segments(graph, {"x", "a", "y"})
    assert (first.name, first.leaves, first.main.op_type) == ("a", ("x",), "Mul")
    assert (second.name, second.leaves, second.main.op_type) == ("y", ("a",), "Neg")
    assert [node.op_type for node in first.nodes] == ["Cast", "Cast", "Mul"]


def test_constants_do_not_live(read) -> None:
    graph = read("g (float[2] x) => (float[2] y) <float w = {2}> { k = Neg(w)  y = Mul(x, k) }")
    assert alive(graph) == {"x", "y"}


QUANTIZED = """
g (float[2] x) => (float[2] y) <float s = {0.1}, uint8 z = {0}> {
  a = Neg(x)
  q = QuantizeLinear(a, s, z)
  d = DequantizeLinear(q, s, z)
  y = Exp(d)
}
"""


def test_a_tensor_read_quantized_is_what_is_read(read) -> None:
    names = [value.name for node in prepared(read(QUANTIZED)).nodes() for value in node.outputs]
    assert names == [f"a{UNQUANTIZED}", "q", "a", "y"]


def test_a_tensor_that_is_read_in_float_too_keeps_its_name(read) -> None:
    graph = prepared(read(QUANTIZED.replace("y = Exp(d)", "y = Add(d, a)")))
    assert [value.name for node in graph.nodes() for value in node.outputs] == ["a", "q", "d", "y"]
