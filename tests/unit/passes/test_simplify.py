from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import onnxsim
import pytest

from enginesmith.compiler.graph import Graph, probe
from enginesmith.compiler.signature import AxisRange, Signature
from enginesmith.errors import DataError
from enginesmith.passes import simplify
from enginesmith.passes.base import Context
from enginesmith.passes.simplify import Simplify

SIMPLIFY = Simplify()
CONSTANTS = """g (float[N,2] image) => (float[N,2] logits) {
    two = Constant <value = float {2.0}> ()  three = Constant <value = float {3.0}> ()  six = Mul(two, three)
    a = Identity(image)  b = Mul(a, six)  logits = Identity(b) }"""
PLAIN = "g (float[N,2] x) => (float[N,2] y) { y = Relu(x) }"
RANDOM = np.random.default_rng(0)


def test_folds_constants_and_keeps_names_and_axes(rewrite, read):
    graph, result = rewrite(SIMPLIFY, CONSTANTS)
    assert graph.operators() == {"Constant": 1, "Mul": 1}
    assert result.changes == {"nodes before": 6, "nodes after": 2}
    assert (graph.input_names, graph.output_names) == (("image",), ("logits",))
    assert [str(v.shape) for v in (*graph.model.graph.inputs, *graph.model.graph.outputs)] == ["[N,2]", "[N,2]"]
    inputs = {"image": np.float32([[1, 2]])}
    np.testing.assert_array_equal(probe.run(graph, inputs)["logits"], probe.run(read(CONSTANTS), inputs)["logits"])


def test_folds_batch_normalization(rewrite, read):
    values = ", ".join(
        f"float[2] {name} = {{{a}, {b}}}" for name, a, b in [("s", 2, 3), ("o", 1, -1), ("m", 0.5, 0.1), ("v", 4, 9)]
    )
    text = f"""g (float[N,1,4,4] x) => (float[N,2,3,3] y)
        <float[2,1,2,2] w = {{1, 2, 3, 4, 5, 6, 7, 8}}, {values}> {{
        c = Conv(x, w)  y = BatchNormalization(c, s, o, m, v) }}"""
    graph, result = rewrite(SIMPLIFY, text)
    assert graph.operators() == {"Conv": 1}
    assert not result.refusals
    inputs = {"x": RANDOM.standard_normal((3, 1, 4, 4)).astype(np.float32)}
    np.testing.assert_allclose(probe.run(graph, inputs)["y"], probe.run(read(text), inputs)["y"], rtol=1e-5)


def test_subgraphs(rewrite):
    text = """g (float[2] x, bool c) => (float[2] y) {
        y = If (c) <then_branch = t () => (float[2] p) { a = Identity(x)  b = Identity(a)  p = Neg(b) },
                    else_branch = e () => (float[2] q) { q = Relu(x) }> }"""
    graph, _ = rewrite(SIMPLIFY, text)
    assert graph.operators() == {"If": 1, "Neg": 1, "Relu": 1}


def test_inputs_with_a_default_stay_inputs(rewrite):
    text = "g (float[2] x, float[2] w = {1, 2}) => (float[2] y) { a = Identity(x)  y = Add(a, w) }"
    graph, result = rewrite(SIMPLIFY, text)
    assert [value.name for value in graph.model.graph.inputs] == ["x", "w"]
    assert probe.run(graph, {"x": np.float32([1, 1]), "w": np.float32([5, 5])})["y"].tolist() == [6, 6]
    assert not result.refusals


def test_large_results_are_not_folded(rewrite):
    text = """g (float[N] x) => (float[1000,1000] y) <float one = {1}, int64[2] shape = {1000, 1000}> {
        e = Expand(one, shape)  s = ReduceSum(x)  y = Add(e, s) }"""
    graph, _ = rewrite(SIMPLIFY, text)
    assert graph.weight_bytes < 1000


def test_nothing_to_simplify_costs_no_check(rewrite, context, monkeypatch):
    graph, _ = rewrite(SIMPLIFY, PLAIN)
    monkeypatch.setattr(simplify, "run", None)
    assert not SIMPLIFY(graph, context(graph)).modified


def replaced_by(monkeypatch, text: str) -> None:
    """Lets onnxsim return this graph whatever it is given."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    monkeypatch.setattr(onnxsim, "simplify", lambda path, output_path, **options: onnx.save(proto, output_path))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PLAIN.replace("Relu", "Abs"), "onnxsim changes output 'y': relative L2 "),
        (PLAIN.replace("[N,2] x", "[N,2] z").replace("(x)", "(z)"), "onnxsim changed the inputs to z"),
        (PLAIN.replace("[N,2] y", "[N,2] z").replace("y =", "z ="), "onnxsim changed the outputs to z"),
        (PLAIN.replace("Relu(x)", "Relu(zz)"), "input 'zz' of node 'y'"),
        (PLAIN.replace("y = Relu(x)", "r = Relu(x)  y = ReduceSum <keepdims = 0> (r)"), "relative L2 inf"),
    ],
)
def test_refuses_another_graph(rewrite, read, monkeypatch, text, reason):
    replaced_by(monkeypatch, text)
    graph, result = rewrite(SIMPLIFY, PLAIN)
    assert not result.modified
    assert reason in result.refusals[0].reason
    assert graph.fingerprint() == read(PLAIN).fingerprint()


@pytest.mark.parametrize("point", ["N=1..3..8", "N=3..3..8"])
def test_refuses_a_size_folded_into_the_graph(rewrite, read, monkeypatch, context, point):
    text = "g (float[N] x) => (float[N] y) { s = Shape(x)  e = ConstantOfShape(s)  y = Add(x, e) }"
    replaced_by(monkeypatch, "g (float[N] x) => (float[N] y) <float[3] e = {0, 0, 0}> { y = Add(x, e) }")
    graph = read(text)
    low, middle, high = (int(size) for size in point.removeprefix("N=").split(".."))
    signature = dataclasses.replace(context(graph).signature, axes={"N": AxisRange(low, middle, high)})
    result = SIMPLIFY(graph, Context(signature))
    assert not result.modified
    assert "cannot be checked" in result.refusals[0].reason or "changes output" in result.refusals[0].reason


def test_wrong_data_is_the_users_mistake(read):
    class Wrong:
        def __iter__(self):
            raise DataError("input 'x' has the wrong dtype")

    graph = read(CONSTANTS)
    with pytest.raises(DataError, match="wrong dtype"):
        SIMPLIFY(graph, Context(Signature(()), samples=Wrong()))


def test_takes_differences_of_rounding(rewrite, monkeypatch):
    replaced_by(
        monkeypatch,
        PLAIN.replace("{", "<float k = {1.000001}> {").replace("y = ", "r = ").replace(" }", "  y = Mul(r, k) }"),
    )
    assert rewrite(SIMPLIFY, PLAIN)[1].modified


def test_float16_may_differ_by_its_roundings(rewrite, monkeypatch):
    text = "g (float16[N] x) => (float16[N] y) <float s = {SCALE}> { k = Cast <to = 10> (s)  y = Mul(x, k) }"
    for scale, modified in (("1.001", True), ("1.01", False)):
        with monkeypatch.context() as patch:
            replaced_by(patch, text.replace("SCALE", scale))
            assert rewrite(SIMPLIFY, text.replace("SCALE", "1.0"))[1].modified == modified


def test_refuses_integers_that_change(rewrite, monkeypatch):
    text = "g (int64[N] x) => (int64[N] y) <int64 k = {1000000}> { y = Add(x, k) }"
    replaced_by(monkeypatch, text.replace("1000000", "1000001"))
    assert "changes output 'y': relative L2 inf" in rewrite(SIMPLIFY, text)[1].refusals[0].reason


def test_refuses_when_onnxsim_fails(rewrite, monkeypatch):
    def fail(path: str, **options: object) -> None:
        raise RuntimeError("no supported data type: 17")

    monkeypatch.setattr(onnxsim, "simplify", fail)
    _, result = rewrite(SIMPLIFY, PLAIN)
    assert result.refusals[0].reason == "onnxsim failed: no supported data type: 17"


def test_another_order_of_constants_is_no_change(rewrite, monkeypatch):
    def rotate(path: str, output_path: str, **options: object) -> None:
        model = onnx.load(path)
        first = model.graph.node.pop(0)
        constants = [node for node in model.graph.node if node.op_type == "Constant"]
        model.graph.node.insert(len(constants), first)
        onnx.save(model, output_path)

    monkeypatch.setattr(onnxsim, "simplify", rotate)
    text = """g (float[N,2] x) => (float[N,2] y) {
        b = Constant <value = float {2.0}> ()  a = Constant <value = float {3.0}> ()  c = Mul(x, a)  y = Mul(c, b) }"""
    _, result = rewrite(SIMPLIFY, text)
    assert not result.refusals


def test_refuses_when_onnxsim_finds_no_end(rewrite, monkeypatch):
    def rename(path: str, output_path: str, **options: object) -> None:
        model = onnx.load(path)
        model.graph.node[0].name += "a"
        onnx.save(model, output_path)

    monkeypatch.setattr(onnxsim, "simplify", rename)
    assert "still changes the graph after 5 rounds" in rewrite(SIMPLIFY, PLAIN)[1].refusals[0].reason


def test_refuses_weights_that_grow(rewrite, monkeypatch):
    monkeypatch.setattr(simplify, "_GROWTH_BYTES", 4)
    replaced_by(monkeypatch, PLAIN.replace("{ y", "<float[3] w = {0, 0, 0}> { y"))
    assert "weights would grow from 0 to 12 bytes" in rewrite(SIMPLIFY, PLAIN)[1].refusals[0].reason


def test_refuses_what_cannot_be_checked(rewrite):
    _, result = rewrite(SIMPLIFY, CONSTANTS, [{"image": np.zeros((1, 3, 8, 8), np.float64)}])
    assert result.refusals[0].reason.startswith("the result cannot be checked: ONNX Runtime cannot run the graph")


def test_refuses_above_two_gigabytes(rewrite, monkeypatch):
    monkeypatch.setattr(Graph, "weight_bytes", 3 << 30)
    assert "onnxsim takes no model above 2 GB; this one has 3.2 GB" in rewrite(SIMPLIFY, PLAIN)[1].refusals[0].reason


def test_large_weights_outlive_the_files_they_travel_in(read, context):
    text = "g (float[512,1024] x) => (float[512,1024] y) <float w = {0}> { a = Identity(x)  y = Add(a, w) }"
    graph = read(text)
    array = RANDOM.standard_normal((512, 1024)).astype(np.float32)
    weight = graph.model.graph.initializers["w"]
    weight.const_value, weight.shape = ir.Tensor(array, name="w"), ir.Shape(array.shape)
    assert SIMPLIFY(graph, context(graph)).modified
    np.testing.assert_array_equal(probe.run(graph, {"x": np.zeros_like(array)})["y"], array)


def _given_to_onnxsim(monkeypatch):
    """The inputs of every graph that onnxsim was called with."""
    seen = []
    real = onnxsim.simplify

    def spy(path, output_path, **options):
        seen.append([value.name for value in onnx.load(path).graph.input])
        return real(path, output_path=output_path, **options)

    monkeypatch.setattr(onnxsim, "simplify", spy)
    return seen


TWO_LAYERS = """g (float[N,256] x, float[256,256] w) => (float[N,256] z) {
    i = Identity(x)  y = MatMul(i, w)  z = Relu(y) }"""


def _with_large_weight(read, text):
    """The graph with its input `w` made an initializer of 256 KiB."""
    graph = read(text)
    weight = graph.model.graph.inputs.pop(1)
    weight.const_value = ir.tensor(RANDOM.standard_normal((256, 256)).astype(np.float32), name="w")
    graph.model.graph.register_initializer(weight)
    return graph


def test_large_weights_are_not_given_to_onnxsim(read, context, monkeypatch):
    seen = _given_to_onnxsim(monkeypatch)
    graph = _with_large_weight(read, TWO_LAYERS)
    before, weight = graph.clone(), graph.model.graph.initializers["w"].const_value
    assert SIMPLIFY(graph, context(graph)).modified
    assert seen[0] == ["x", "w"]
    assert graph.operators() == {"MatMul": 1, "Relu": 1}
    assert graph.input_names == ("x",)
    assert graph.model.graph.initializers["w"].const_value is weight
    inputs = {"x": RANDOM.standard_normal((3, 256)).astype(np.float32)}
    np.testing.assert_array_equal(probe.run(graph, inputs)["z"], probe.run(before, inputs)["z"])


@pytest.mark.parametrize(
    "text",
    [
        TWO_LAYERS.replace("MatMul(i, w)", "MatMul(i, t)").replace("i =", "t = Transpose(w)  i ="),
        TWO_LAYERS.replace("z = Relu(y)", "z = Mul(y, i)"),
        TWO_LAYERS.replace("MatMul(i, w)", "MatMul(c, w)").replace("i =", "c = Neg(w)  i ="),
    ],
    ids=["transposed", "scaled", "constant"],
)
def test_large_weights_that_may_be_folded_are_given_to_onnxsim(read, context, monkeypatch, text):
    seen = _given_to_onnxsim(monkeypatch)
    graph = _with_large_weight(read, text)
    SIMPLIFY(graph, context(graph))
    assert seen[0] == ["x"]
