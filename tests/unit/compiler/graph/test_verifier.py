from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from enginesmith.compiler.graph import Graph
from enginesmith.errors import GraphError

HEADER = '<ir_version: 8, opset_import: ["": 17, "local": 1, "com.microsoft": 1]>\n'
FUNCTION = '\n<domain: "local", opset_import: ["": 17]> half (x) => (y) { y = Abs(x) }'

LEGAL = [
    "g (float[2] x) => (float[2] y) { y = Relu(x) }",
    "g (float[2] x) => (float[2] x) { a = Relu(x) }",
    "g (float[2] x) => (float[2] y) { y = Clip(x, , ) }",
    "g (float[2] x) => (float[2] y) { y = Dropout(x) }",
    "g (float[2] x) => (float[2] y) { y = com.microsoft.Gelu(x) }",
    "g (float[2] x) => (float[2] y) { y = local.half(x) }" + FUNCTION,
    "g (float[2] x, float[2] w = {1, 2}) => (float[2] y) { y = Add(x, w) }",
    "g (seq(float[2]) x) => (float[N] y) { y = ConcatFromSequence <axis = 0> (x) }",
    """g (float[2] x, bool c) => (float[2] y) { a = Neg(x)
        y = If (c) <then_branch = t () => (float[2] p) { p = Relu(a) },
                    else_branch = e () => (float[2] q) { p = Abs(x)  q = Relu(p) }> }""",
]

ILLEGAL = {
    "{ a = Add(x, b)  b = Relu(a)  y = Neg(b) }":
        r"a cycle through node 'a' \(Add\) and tensor 'b'(.|\n)*'a' \(Add\) -> node 'b' \(Relu\) -> node 'a'",
    "{ a = Neg(b)  b = Relu(x)  y = Neg(a) }": r"input 'b' of node 'a' \(Neg\) is used before it is defined",
    "{ y = Relu(z) }": r"input 'z' of node 'y' \(Relu\) is not defined anywhere",
    "{ a = Relu(x) }": "output 'y' is not produced",
    "{ y = Reluu(x) }": r"node 'y' \(Reluu\): operator ai.onnx::Reluu does not exist(.|\n)*opset 17",
    "{ y = com.microsoft.Geluu(x) }": "operator com.microsoft::Geluu does not exist",
    "{ y = other.Relu(x) }": r"node 'y' \(Relu\): domain 'other' is not imported",
    "{ y = Upsample(x, x) }": "operator ai.onnx::Upsample does not exist",
    "{ y = Relu(x, x) }": r"wrong number of inputs(.|\n)*expected: 1 to 1(.|\n)*found: 2",
    "{ y, z = Relu(x) }": r"wrong number of outputs(.|\n)*found: 2",
    "{ y = Concat <axis = 0> () }": r"wrong number of inputs(.|\n)*at least 1",
    "{ y = Gather( , x) }": "required input 'data' is left out",
    "{ y = Relu <slope = 1.0> (x) }": r"attribute 'slope' does not exist(.|\n)*expected: none",
    "{ y = Cast(x) }": "attribute 'to' is missing",
    "{ i = Cast <to = 7> (x)  y = Sigmoid(i) }": r"type of 'i' \(X\)(.|\n)*found: tensor\(int64\)",
    "{ i = Cast <to = 7> (x)  y = Add(x, i) }": r"type of 'i' \(B\)(.|\n)*tensor\(float\)(.|\n)*tensor\(int64\)",
    "{ y = Gather(x, x) }": r"type of 'x' \(indices\)",
    "{ y = local.half(x, x) }" + FUNCTION: r"wrong number of inputs or outputs(.|\n)*at most 1 inputs",
    "{ y = local.half(x) }" + FUNCTION.replace("Abs", "Abss"): "operator ai.onnx::Abss does not exist",
    "{ y = local.half(x) }" + FUNCTION.replace("(x) }", "(z) }"): "input 'z' of node 'y'",
}  # fmt: skip


def parse(text: str) -> Graph:
    return Graph.from_proto(onnx.parser.parse_model(HEADER + text))


def declared(text: str) -> Graph:
    """The graph with the types of int64 values filled in, which inference would refuse to do."""
    graph = parse(text)
    for node in graph.nodes():
        if node.op_type == "Cast" and node.outputs[0].name == "i":
            node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    return graph


@pytest.mark.parametrize("text", LEGAL)
def test_legal(text):
    parse(text).verify()


@pytest.mark.parametrize("body", ILLEGAL, ids=str)
def test_illegal(body):
    with pytest.raises(GraphError, match=ILLEGAL[body]):
        declared("g (float[2] x) => (float[2] y) " + body).verify()


def test_illegal_in_a_subgraph():
    text = """g (float[2] x, bool c) => (float[2] y) {
        y = If (c) <then_branch = t () => (float[2] p) { p = Relu(late) },
                    else_branch = e () => (float[2] q) { q = Relu(x) }>
        late = Neg(x) }"""
    with pytest.raises(GraphError, match=r"graph 't': input 'late' of node 'p' \(Relu\) is not defined"):
        parse(text).verify()


def test_cycle_through_a_subgraph():
    text = """g (float[2] x, bool c) => (float[2] y) {
        y = If (c) <then_branch = t () => (float[2] p) { p = Relu(late) },
                    else_branch = e () => (float[2] q) { q = Relu(x) }>
        late = Neg(y) }"""
    with pytest.raises(GraphError, match=r"input 'late' of node 'p' \(Relu\)"):
        parse(text).verify()


def test_name_of_an_outer_scope_is_taken():
    text = """g (float[2] x, bool c) => (float[2] y) { a = Neg(x)
        y = If (c) <then_branch = t () => (float[2] p) { a = Relu(x)  p = Abs(a) },
                    else_branch = e () => (float[2] q) { q = Relu(x) }> }"""
    with pytest.raises(GraphError, match=r"tensor 'a' is defined twice, by node 'a' \(Neg\) and by node 'a' \(Relu\)"):
        parse(text).verify()


def test_input_given_twice():
    with pytest.raises(GraphError, match="tensor 'x' is defined twice, as an input and as an input"):
        parse("g (float[2] x, float[2] x) => (float[2] y) { y = Relu(x) }").verify()


def test_names_that_a_pass_broke():
    graph = parse("g (float[2] x) => (float[2] y) { a = Neg(x)  y = Relu(a) }")
    graph.model.graph.node(0).outputs[0].name = "x"
    with pytest.raises(GraphError, match="tensor 'x' is defined twice, as an input and by node 'x'"):
        graph.verify()
    graph.model.graph.node(0).outputs[0].name = None
    with pytest.raises(GraphError, match=r"a value by node .* has no name"):
        graph.verify()


def test_node_that_a_pass_removed_but_still_uses():
    graph = parse("g (float[2] x) => (float[2] y) { a = Neg(x)  y = Relu(a) }")
    graph.model.graph.remove(graph.model.graph.node(0))
    with pytest.raises(GraphError, match=r"input 'a' of node 'y' \(Relu\) is not defined anywhere"):
        graph.verify()


def test_output_type_must_match(read):
    graph = read("g (float[2] x) => (float[2] y) { a = Neg(x)  y = Relu(a) }")
    graph.model.graph.node(0).outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    with pytest.raises(GraphError, match=r"type of 'a' \(Y\)(.|\n)*tensor\(float\)(.|\n)*tensor\(float16\)"):
        graph.verify()


def test_initializers_count_as_defined(read):
    graph = read("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }")
    graph.verify()
    weight = ir.Value(
        name="loose", const_value=ir.Tensor(np.zeros(2, np.float32)), type=ir.TensorType(ir.DataType.FLOAT)
    )
    graph.model.graph.node(0).replace_input_with(1, weight)
    with pytest.raises(GraphError, match="input 'loose' of node 'y'"):
        graph.verify()
