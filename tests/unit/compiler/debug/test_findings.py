from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np
import pytest

from enginesmith.compiler.debug.distance import distance, worst
from enginesmith.compiler.debug.findings import Findings, find
from enginesmith.compiler.debug.parts import prepared
from enginesmith.compiler.debug.runtimes import AsEngine, plainly
from enginesmith.compiler.debug.trace import Side
from enginesmith.compiler.graph import Graph
from enginesmith.errors import BuildError, GraphError
from enginesmith.targets import get_target

X = {"x": np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)}
NET = """
g (float[N, 3] x) => (float[N, 2] y)
  <float[3,3] w = {1, -2, 0.5, 0.3, 1, -1, 0.7, 0.2, 2}, float[3,2] v = {1, 2, -1, 0.5, 0.25, 1}> {
  h = MatMul(x, w)
  r = Relu(h)
  m = Softplus(r)
  y = MatMul(m, v)
}
"""
ENGINE = AsEngine(get_target("onnxruntime-cpu", {"threads": 1}), "fp32")


def looked_into(read, engine: str, reference: str = NET, threshold: float = 1e-3, inputs: Mapping = X) -> Findings:
    subject = Side(prepared(read(engine)), ENGINE)
    oracle = Side(prepared(read(reference)), plainly)
    return judged(subject, oracle, threshold, inputs)


def judged(subject: Side, oracle: Side, threshold: float, inputs: Mapping = X) -> Findings:
    truth = oracle.values(inputs, oracle.graph.output_names)
    outputs = subject.values(inputs, tuple(truth))
    error = worst([distance(truth[name], outputs[name]) for name in truth])
    return find(subject, oracle, inputs, truth, error, threshold)


def test_equal_graphs_do_not_diverge(read) -> None:
    found = looked_into(read, NET)
    assert not found.diverges
    assert [row.name for row in found.rows] == ["h", "r", "m", "y"]
    assert {found.verdict(row) for row in found.rows} == {"ok"}
    assert found.culprit is None
    assert found.first is None
    assert found.notes == ()


def test_a_changed_weight_makes_the_error_and_the_rest_inherits_it(read) -> None:
    found = looked_into(read, NET.replace("float[3,3] w = {1, -2", "float[3,3] w = {1, 2"))
    assert found.diverges
    assert found.culprit is not None
    assert found.culprit.row.name == "h"
    assert found.first is found.culprit.row
    assert [found.verdict(row) for row in found.rows] == ["makes", "inherits", "inherits", "inherits"]
    assert found.culprit.effect == pytest.approx(found.error, rel=1e-3)
    (cause,) = found.culprit.explanation.causes
    assert cause.startswith("weight w differs from the reference's by ")
    assert cause.endswith("most at [0, 1]: 2 against -2")


def test_a_weight_beyond_float16_is_an_overflow(read) -> None:
    big = "g (float[N, 3] x) => (float[N, 3] y) <float k = {100000}> { m = Mul(x, k)  y = Div(m, k) }"
    half = """
    g (float[N, 3] x) => (float[N, 3] y) <float k = {100000}> {
      k16 = Cast<to = 10>(k)
      x16 = Cast<to = 10>(x)
      m = Mul(x16, k16)
      d = Div(m, k16)
      y = Cast<to = 1>(d)
    }
    """
    found = looked_into(read, half, big)
    assert math.isinf(found.error)
    assert found.culprit is not None
    assert found.culprit.row.name == "m"
    assert found.culprit.row.dtype == "float16"
    causes = found.culprit.explanation.causes
    assert any("overflow: m reaches" in cause and "float16 ends at 65504" in cause for cause in causes)
    assert any("weight k is not finite in the engine" in cause for cause in causes)


def test_a_nan_is_named_where_it_is_born(read) -> None:
    root = "g (float[N, 3] x) => (float[N, 3] y) { a = Mul(x, x)  b = Sqrt(a)  y = Neg(b) }"
    found = looked_into(read, root.replace("Mul(x, x)", "Identity(x)"), root)
    assert found.culprit is not None
    assert found.culprit.row.name == "a"  # the root itself is right on right inputs
    assert [found.verdict(row) for row in found.rows] == ["makes", "inherits", "inherits"]
    found = looked_into(read, root.replace("Sqrt(a)", "Log(c)").replace("{ a", "{ c = Neg(x)  a"), root)
    assert found.culprit is not None
    assert found.culprit.row.name == "b"
    assert any(
        "NaN is born here" in cause and "the logarithm of a negative number" in cause
        for cause in found.culprit.explanation.causes
    )


QUANTIZED = """
g (float[N, 3] x) => (float[N, 2] y)
  <float[3,3] w = {1, -2, 0.5, 0.3, 1, -1, 0.7, 0.2, 2}, float[3,2] v = {1, 2, -1, 0.5, 0.25, 1},
   float s = {SCALE}, uint8 z = {0}> {
  r = MatMul(x, w)
  q = QuantizeLinear(r, s, z)
  d = DequantizeLinear(q, s, z)
  m = Softplus(d)
  y = MatMul(m, v)
}
"""


def test_a_quantizer_may_stand_in_for_a_relu(read) -> None:
    found = looked_into(read, QUANTIZED.replace("SCALE", "0.02"), threshold=0.05)
    assert not found.diverges
    assert {row.name: found.verdict(row) for row in found.rows} == {"r": "ok", "m": "ok", "y": "ok"}


def test_a_quantizer_that_clips_is_found_with_its_share(read) -> None:
    found = looked_into(read, QUANTIZED.replace("SCALE", "0.002"), threshold=0.1)
    assert found.culprit is not None
    assert found.culprit.row.name == "r"
    (cause,) = found.culprit.explanation.causes
    assert cause.startswith("saturation: the quantizer of r clips ")
    assert "it spans 0 to 0.51, they reach from 0 to " in cause  # of the Relu, not of what the quantizer reads
    assert [operand.name for operand in found.culprit.explanation.operands] == ["x", "w"]


def test_few_large_values_stretch_a_quantizer(read) -> None:
    plain = "g (float[N, 3] x) => (float[N, 3] y) { a = Neg(x)  y = Neg(a) }"
    coarse = """
    g (float[N, 3] x) => (float[N, 3] y) <float s = {0.7}, uint8 z = {128}> {
      a = Neg(x)
      q = QuantizeLinear(a, s, z)
      d = DequantizeLinear(q, s, z)
      y = Neg(d)
    }
    """
    found = looked_into(read, coarse, plain, threshold=0.1)
    assert found.culprit is not None
    assert found.culprit.row.name == "a"
    assert any("a step of the quantizer of a is 0.7" in cause for cause in found.culprit.explanation.causes)
    found = looked_into(read, coarse.replace("0.7", "0.001"), plain, threshold=0.1)
    assert found.culprit is not None
    assert any("saturation: the quantizer of a clips" in cause for cause in found.culprit.explanation.causes)


def test_cancellation_is_told(read) -> None:
    plain = "g (float[N, 3] x) => (float[N, 3] y) <float k = {1000}> { a = Add(x, k)  y = Sub(a, k) }"
    half = """
    g (float[N, 3] x) => (float[N, 3] y) <float k = {1000}> {
      b = Add(x, k)
      a = Cast<to = 10>(b)
      k16 = Cast<to = 10>(k)
      c = Sub(a, k16)
      y = Cast<to = 1>(c)
    }
    """
    subject, oracle = Side(prepared(read(half)), ENGINE), Side(prepared(read(plain)), plainly)
    found = find(subject, oracle, X, oracle.values(X, ["y"]), 0.1, 5e-3)  # ONNX Runtime's CPU itself drops such casts
    assert found.culprit is not None
    assert found.culprit.row.name == "y"
    assert any(cause.startswith("cancellation: its terms are ") for cause in found.culprit.explanation.causes)


def test_rounding_alone_is_told(read) -> None:
    half = "x16 = Cast<to = 10>(x)  w16 = Cast<to = 10>(w)  h = MatMul(x16, w16)  h32 = Cast<to = 1>(h)"
    found = looked_into(read, NET.replace("h = MatMul(x, w)", half).replace("Relu(h)", "Relu(h32)"), threshold=1e-5)
    assert found.culprit is not None
    assert found.culprit.row.name == "h"
    (cause,) = found.culprit.explanation.causes
    assert cause.startswith("rounding: float16 is off by up to 0.00049 each time")


def test_an_error_inside_that_reaches_no_output_is_a_note(read) -> None:
    plain = "g (float[N, 3] x) => (float[N, 3] y) <float k = {-1000000}> { a = Add(x, k)  b = Exp(a)  y = Add(b, x) }"
    found = looked_into(read, plain.replace("-1000000", "-60000"), plain)
    assert not found.diverges
    assert found.culprit is None
    assert [found.verdict(row) for row in found.rows] == ["makes", "ok", "ok"]
    assert any(
        note.startswith("inside, a (of 3 tensors) off by more than") and "does not reach the outputs" in note
        for note in found.notes
    )


def wrong_when_fused(graph: Graph, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A runtime that fuses Relu with Softplus, wrongly; where the Relu is looked at, it cannot."""
    outputs = plainly(graph, inputs)
    operators = {node.op_type: node for node in graph.nodes()}
    fused = {"Relu", "Softplus"} <= set(operators) and not operators["Relu"].outputs[0].is_graph_output()
    return {name: array * np.float32(1.5) if fused else array for name, array in outputs.items()}


def test_an_error_that_vanishes_while_tensors_are_looked_at_is_bisected(read) -> None:
    subject = Side(prepared(read(NET)), wrong_when_fused)
    found = judged(subject, Side(prepared(read(NET)), plainly), 1e-3)
    assert found.diverges
    assert {found.verdict(row) for row in found.rows} == {"ok"}
    assert any("vanishes while tensors are looked at" in note for note in found.notes)
    assert found.region is not None
    assert (found.region.before, found.region.after) == (("r",), ("m",))
    assert found.region.error == pytest.approx(0.5, rel=1e-3)


def test_tensors_that_the_target_does_not_give_are_counted(read) -> None:
    def refusing(graph: Graph, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if graph.output_names != ("y",):
            raise BuildError("one output only")
        return plainly(graph, inputs)

    graph = prepared(read(NET))
    found = judged(Side(graph, refusing), Side(graph, plainly), 1e-3)
    assert {found.verdict(row) for row in found.rows} == {"unknown"}
    assert found.notes == ("4 of 4 tensors could not be compared: one output only",)


def test_the_findings_are_json(read) -> None:
    found = looked_into(read, NET.replace("float[3,3] w = {1, -2", "float[3,3] w = {1, 2"))
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert value["culprit"]["tensor"] == "h"
    assert value["culprit"]["operator"] == "MatMul"
    assert [operand["weight"] for operand in value["culprit"]["operands"]] == [False, True]
    assert [row["verdict"] for row in value["rows"]] == ["makes", "inherits", "inherits", "inherits"]
    assert set(value["rows"][0]) == {
        "tensor", "node", "operator", "dtype", "inputs", "verdict", "total", "local", "reason",
    }  # fmt: skip


def test_graphs_without_a_common_tensor_are_an_error(read) -> None:
    other = "g (float[N, 3] x) => (float[N, 3] z) { z = Neg(x) }"
    subject, oracle = Side(prepared(read(other)), plainly), Side(prepared(read(NET)), plainly)
    with pytest.raises(GraphError, match="share no tensor by name"):
        find(subject, oracle, X, oracle.values(X, ["y"]), 1.0, 1e-3)
