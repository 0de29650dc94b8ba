from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from enginesmith.compiler.graph import probe
from enginesmith.compiler.graph.emulation import emulate
from enginesmith.passes.cast import Cast

LOW = [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)]


def lowered(read, context, text: str, to: str):
    graph = read(text)
    Cast(to=to)(graph, context(graph))
    return graph


@pytest.mark.parametrize(("to", "dtype"), LOW)
@pytest.mark.parametrize("optimized", [False, True])
def test_every_result_is_rounded(read, context, to, dtype, optimized):
    """Overflow and flush to zero included, which ONNX Runtime's own float16 on a CPU leaves out."""
    graph = lowered(read, context, "g (float[N] x) => (float[N] y) { s = Mul(x, x)  r = Sqrt(s)  y = Neg(r) }", to)
    emulated = emulate(graph)
    emulated.verify()
    assert emulated.output_names == ("y",)
    x = np.float32([300, 1.2345, 1e-5])
    with np.errstate(over="ignore"):
        rounded = x.astype(dtype)
        expected = -np.sqrt(rounded * rounded)
    found = probe.Session(emulated, optimized=optimized)({"x": x})[0]
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize(("to", "dtype"), LOW)
def test_weights_are_rounded(read, context, to, dtype):
    graph = lowered(
        read, context, "g (float[1,1] x) => (float[1,1] y) <float[1,1] w = {1.2345}> { y = MatMul(x, w) }", to
    )
    found = probe.run(emulate(graph), {"x": np.float32([[1]])})["y"]
    assert found.item() == float(dtype(1.2345)) != 1.2345
    weights = [value.const_value for value in graph.model.graph.initializers.values()]
    assert weights[0].dtype.numpy() == dtype  # the graph itself stays as it is


@pytest.mark.parametrize(("to", "dtype"), LOW)
def test_branches_and_typed_attributes(read, context, to, dtype):
    text = """g (float[2] x, bool c) => (float[2] y) {
        s = Shape(x)  k = ConstantOfShape <value = float[1] {1.1}> (s)
        b = If (c) <then_branch = t () => (float[2] p) { p = Mul(x, k) },
                    else_branch = e () => (float[2] r) { r = Sub(x, k) }>
        y = Neg(b) }"""
    emulated = emulate(lowered(read, context, text, to))
    emulated.verify()
    x = np.float32([1.7, 3.3])
    found = probe.run(emulated, {"x": x, "c": np.array(True)})["y"]
    np.testing.assert_array_equal(found, -(x.astype(dtype) * dtype(1.1)).astype(np.float32))


def test_nothing_to_round(read):
    graph = read("g (float[N] x) => (float[N] y) { y = Neg(x) }")
    assert emulate(graph).fingerprint() == graph.fingerprint()
    assert emulate(graph).model.graph.inputs[0].dtype == ir.DataType.FLOAT
