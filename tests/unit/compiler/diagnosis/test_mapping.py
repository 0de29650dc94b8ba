from __future__ import annotations

import pytest

from enginesmith.compiler.diagnosis.mapping import nodes_of
from enginesmith.compiler.graph.selection import label
from enginesmith.targets.profile import LayerTime

NET = """g (float[N,3] x) => (float[N,3] y) <float[3,3] w, float[3] b, int64[2] s = {0, 3}> {
    [conv] a = MatMul(x, w)  [bias] c = Add(a, b)  [relu] d = Relu(c)  [shape] e = Reshape(d, s)
    [exp] f = Exp(e)  [last] y = Add(f, d) }"""


def mapped(graph, *layers):
    return [[label(node) for node in nodes] for nodes in nodes_of(graph, layers)]


def layer(name="", *, nodes=(), outputs=()):
    return LayerTime(name, "", 1.0, "cpu", nodes=nodes, outputs=outputs)


def test_the_tensor_that_a_kernel_gives_brings_what_leads_up_to_it(fill):
    graph = fill(NET)
    found = mapped(graph, layer("fused", outputs=("d",)), layer("rest", outputs=("y",)))
    assert found == [["conv", "bias", "relu"], ["shape", "exp", "last"]]


@pytest.mark.parametrize(
    "first",
    [
        layer("relu"),
        layer("d_nchwc"),
        layer("conv + bias + relu"),
        layer("fused", nodes=("conv", "bias", "relu")),
        layer("relu/WithoutBiases"),
        layer("relu/MatMulAddFusion_token_12"),
    ],
)
def test_names_that_runtimes_change(fill, first):
    graph = fill(NET)
    assert mapped(graph, first, layer("last"))[0] == ["conv", "bias", "relu"]


def test_a_node_belongs_to_one_layer_and_strangers_have_none(fill):
    graph = fill(NET)
    found = mapped(graph, layer("relu"), layer("relu"), layer("Reorder_7"), layer("exp"))
    assert found == [["conv", "bias", "relu"], [], [], ["shape", "exp"]]
    assert mapped(graph) == []
