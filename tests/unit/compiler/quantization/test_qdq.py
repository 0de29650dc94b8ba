from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from enginesmith.compiler.graph import probe
from enginesmith.compiler.quantization.parameters import activation_parameters, weight_parameters
from enginesmith.compiler.quantization.plan import Plan, Use, Weight, merge_groups
from enginesmith.compiler.quantization.qdq import Editor, Quantized, insert, quantized_nodes

RANGE = activation_parameters(-1, 3, ir.DataType.UINT8, symmetric=False)
X = np.float32([[0.3, -0.7], [2.9, 1.1]])


def node(graph, operator: str) -> ir.Node:
    return next(n for n in graph.nodes() if n.op_type == operator)


def test_uses_share_one_pair_and_others_read_the_float_value(read):
    graph = read("g (float[2,2] x) => (float[2,2] a, float[2,2] b, float[2,2] c) { a = Abs(x) b = Neg(x) c = Exp(x) }")
    uses = [Use(node(graph, "Abs"), 0), Use(node(graph, "Neg"), 0)]
    Editor(graph).activation(graph.model.graph.inputs[0], uses, RANGE)
    graph.infer()
    graph.verify()
    assert graph.operators() == {"QuantizeLinear": 1, "DequantizeLinear": 1, "Abs": 1, "Neg": 1, "Exp": 1}
    assert node(graph, "Exp").inputs[0].name == "x"
    found = probe.run(graph, {"x": X})
    np.testing.assert_array_equal(found["b"], -RANGE.round(X))
    np.testing.assert_allclose(found["c"], np.exp(X), rtol=1e-6)


def test_an_output_keeps_its_name(read):
    graph = read("g (float[2,2] x) => (float[2,2] y, float[2,2] z) { y = Neg(x) z = Abs(y) }")
    Editor(graph).activation(node(graph, "Neg").outputs[0], [Use(None, 0)], RANGE)
    graph.verify()
    assert graph.output_names == ("y", "z")
    assert node(graph, "Abs").inputs[0] is node(graph, "Neg").outputs[0]
    np.testing.assert_array_equal(probe.run(graph, {"x": X})["y"], RANGE.round(-X))


def test_shape_is_read_from_the_integers(read):
    graph = read("g (float[N,2] x) => (float[N,2] y, int64[2] s) { h = Neg(x) y = Abs(h) s = Shape(h) }")
    uses = [Use(node(graph, "Abs"), 0), Use(node(graph, "Shape"), 0)]
    Editor(graph).activation(node(graph, "Neg").outputs[0], uses, RANGE)
    graph.infer()
    graph.verify()
    assert node(graph, "Shape").inputs[0].dtype == ir.DataType.UINT8
    assert probe.run(graph, {"x": X})["s"].tolist() == [2, 2]


def test_layers_that_share_a_weight_share_its_integers(weighted):
    graph = weighted("g (float[N,2] x, float[2,2] w) => (float[N,2] y) { h = MatMul(x, w) y = MatMul(h, w) }")
    layers = list(graph.nodes())
    weights = [Weight(Use(layer, 1), 1) for layer in layers]
    array = weights[0].value.const_value.numpy()
    stored = {weight: Quantized.nearest(array, weight_parameters(array, 1, weight.dtype)) for weight in weights}
    assert insert(graph, Plan({}, tuple(weights)), {}, stored, {}) == {
        "activations quantized": 0,
        "weights quantized": 2,
        "biases quantized": 0,
    }
    graph.infer()
    graph.verify()
    assert graph.operators() == {"DequantizeLinear": 1, "MatMul": 2}
    assert set(graph.model.graph.initializers) == {"w/quantized", "w/scale", "w/zero_point"}
    real = next(iter(stored.values())).real()
    np.testing.assert_allclose(probe.run(graph, {"x": X})["y"], X @ real @ real, rtol=1e-5)


def test_a_weight_that_a_float_node_reads_stays_beside(weighted):
    graph = weighted("g (float[N,2] x, float[2,2] w) => (float[N,2] y) { h = MatMul(x, w) y = Add(h, w) }")
    weight = Weight(Use(node(graph, "MatMul"), 1), None)
    array = weight.value.const_value.numpy()
    Editor(graph).constant(weight.use, Quantized.nearest(array, weight_parameters(array, None, weight.dtype)))
    graph.verify()
    assert "w" in graph.model.graph.initializers


def test_names_that_are_taken_are_left_alone(read):
    graph = read("g (float[2,2] x) => (float[2,2] y) <float[1] taken> { y = Neg(x) }".replace(" <float[1] taken>", ""))
    graph.model.graph.inputs[0].name = "x"
    node(graph, "Neg").outputs[0].name = "x/quantized"
    Editor(graph).activation(graph.model.graph.inputs[0], [Use(node(graph, "Neg"), 0)], RANGE)
    graph.verify()
    assert node(graph, "QuantizeLinear").outputs[0].name == "x/quantized.2"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("g (float[2] x) => (float[2] y) { y = Abs(x) }", 0),
        ("g (uint8[2] x, float s) => (float[2] y) { y = DequantizeLinear(x, s) }", 1),
        ("g (uint8[2,2] x, int8[2,2] w) => (int32[2,2] y) { y = MatMulInteger(x, w) }", 1),
        ("g (uint8[2,2] x, float s, uint8 z) => (uint8[2,2] y) { y = com.microsoft.QLinearSigmoid(x, s, z, s, z) }", 1),
        (
            """g (bool c, float[2] x, float s) => (float[2] y) { y = If(c) <
                then_branch = t () => (float[2] a) { q = QuantizeLinear(x, s) a = DequantizeLinear(q, s) },
                else_branch = e () => (float[2] b) { b = Abs(x) }> }""",
            2,
        ),
    ],
)
def test_quantized_graphs_are_told(read, text, count):
    assert len(quantized_nodes(read(text))) == count


def test_groups_that_overlap_are_joined():
    assert merge_groups([["a", "b"], ["c", "d"], ["b", "e"], ["f"], []]) == (frozenset("cd"), frozenset("abe"))


def test_a_plan_tells_what_shares_a_range(weighted):
    graph = weighted("g (float[N,2] x, float[2,2] w) => (float[N,2] y) { h = MatMul(x, w) y = Abs(h) }")
    product, _ = graph.nodes()
    plan = Plan({"x": frozenset({Use(product, 0)})}, (Weight(Use(product, 1), 1),), groups=(frozenset("xh"),))
    assert (plan.group_of("h"), plan.group_of("y")) == (frozenset("xh"), frozenset("y"))
