from __future__ import annotations

from enginesmith.compiler.graph.selection import label
from enginesmith.compiler.sensitivity import split

WEIGHT = "float[2,2] w = {1, 2, 3, 4}"
RESIDUAL = f"""g (float[N,2] x, float[N,2] mask) => (float[N,2] y) <{WEIGHT}> {{
    [scale] n = Neg(x)  [m] k = Neg(mask)  [stem] s = MatMul(n, w)  [add0] t = Add(s, k)
    [a1] a = MatMul(t, w)  [r1] b = Relu(a)  [a2] c = MatMul(b, w)  [add1] d = Add(c, t)
    [b1] e = MatMul(d, w)  [r2] f = Add(e, k)  [b2] h = MatMul(f, w)  [add2] y = Add(h, d) }}"""


def names(graph) -> list[str]:
    return [label(node) for node in graph.nodes()]


def test_each_heavy_node_with_the_light_ones_after_it(read):
    graph = read(RESIDUAL)
    units = split(graph, names(graph))
    assert [unit.nodes for unit in units] == [
        ("scale", "m", "stem", "add0"), ("a1", "r1"), ("a2", "add1"), ("b1", "r2"), ("b2", "add2"),
    ]  # fmt: skip
    assert [unit.name for unit in units] == ["stem", "a1", "a2", "b1", "b2"]
    assert units[0].heavy == ("stem",)


def test_blocks_between_single_tensors(read):
    graph = read(RESIDUAL)
    units = split(graph, names(graph), most=3)
    assert [unit.nodes for unit in units] == [
        ("scale", "m", "stem", "add0"), ("a1", "r1", "a2", "add1"), ("b1", "r2", "b2", "add2"),
    ]  # fmt: skip
    assert [unit.name for unit in units] == ["stem", "a1 .. a2", "b1 .. b2"]


def test_nodes_that_cannot_be_lowered_belong_to_none(read):
    graph = read(RESIDUAL)
    units = split(graph, ["r1", "b1", "b2"])
    assert [(unit.name, unit.nodes) for unit in units] == [("r1", ("r1",)), ("b1", ("b1",)), ("b2", ("b2",))]


def test_branches(read):
    graph = read(f"""g (float[N,2] x, bool c) => (float[N,2] y) <{WEIGHT}> {{
        [before] a = MatMul(x, w)
        [if] b = If (c) <then_branch = t () => (float[N,2] p) {{ [inner] q = MatMul(a, w)  [exp] p = Exp(q) }},
                         else_branch = e () => (float[N,2] r) {{ [other] r = Neg(a) }}>
        [after] y = Neg(b) }}""")
    units = split(graph, names(graph))
    assert [unit.nodes for unit in units] == [("before", "if", "other", "after"), ("inner", "exp")]
    assert [unit.name for unit in split(graph, names(graph), most=1)] == ["before", "inner"]


def test_graphs_of_light_nodes(read):
    graph = read("g (float[N] x) => (float[N] y) { [a] u = Neg(x)  [b] v = Exp(u)  [c] y = Tanh(v) }")
    assert [unit.nodes for unit in split(graph, names(graph))] == [("a",), ("b",), ("c",)]
    assert [unit.nodes for unit in split(graph, names(graph), most=2)] == [("a", "b", "c")]
