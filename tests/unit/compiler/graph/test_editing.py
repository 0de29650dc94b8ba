import numpy as np
import onnx_ir as ir
import pytest

from enginesmith.compiler.graph import probe
from enginesmith.compiler.graph.editing import Names, add_initializer, flattened, is_constant

TEXT = """<ir_version: 8, opset_import: ["": 17, "local": 1]>
    g (float[N,2] x, bool c) => (float[N,2] y) <float[2] w = {1, 2}> {
        a = local.f(x)
        y = If(c) <then_branch = t () => (float[N,2] d) { d = Add(a, w) },
                   else_branch = e () => (float[N,2] f) { f = Neg(a) }> }
    <opset_import: ["": 17], domain: "local"> f (p) => (q)
        { k = Constant<value = float[2] {3, 4}>() q = Mul(p, k) }"""


@pytest.mark.parametrize("taken", ["x", "w", "a", "d", "y"])
def test_names_of_inputs_constants_results_and_branches_are_taken(read, taken):
    names = Names(read(TEXT))
    assert names.free(taken) == f"{taken}.2"
    assert names.free(taken) == f"{taken}.3"
    assert names.free("new") == "new"
    assert names.free("new") == "new.2"


def test_a_flat_copy_computes_the_same(read):
    graph = read(TEXT)
    before = graph.fingerprint()
    flat = flattened(graph)
    assert graph.fingerprint() == before
    assert not flat.model.functions
    assert flat.operators() == {"Mul": 1, "If": 1, "Add": 1, "Neg": 1}
    feeds = {"x": np.ones((1, 2), np.float32), "c": np.array(True)}
    np.testing.assert_array_equal(probe.run(flat, feeds)["y"], probe.run(graph, feeds)["y"])


def test_initializers(read):
    graph = read(TEXT)
    value = add_initializer(graph, "small", np.array([1, -2], np.int8), ir.DataType.INT4)
    assert graph.model.graph.initializers["small"] is value
    assert value.dtype == value.const_value.dtype == ir.DataType.INT4
    assert is_constant(value)
    assert not is_constant(graph.model.graph.inputs[0])
    assert not is_constant(None)
