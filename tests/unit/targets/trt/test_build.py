"""The graph that the worker gets."""

import onnx.parser
import pytest

from enginesmith.compiler.graph import Graph
from enginesmith.compiler.signature import parse_inputs
from enginesmith.targets.base import BuildRequest
from enginesmith.targets.trt.build import _typed

FLOAT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[n,4] x) => (float[n,4] y) { a = Relu(x) y = Erf(a) }
"""

QUANTIZED = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[n,4] x) => (float[n,4] y) <float s = {0.1}, int8 z = {0}>
{ q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z) y = Erf(a) }
"""


@pytest.mark.parametrize("precision", ["int8", "mixed"])
@pytest.mark.parametrize(("text", "casts"), [(FLOAT, 2), (QUANTIZED, 0)])
def test_what_nothing_is_quantized_in_is_built_as_fp16(tmp_path, text, casts, precision):
    graph = Graph.from_proto(onnx.parser.parse_model(text))
    graph.infer()
    log = []
    signature = parse_inputs(["x:2x4"], [])
    request = BuildRequest(graph, None, signature, precision, {}, tmp_path, tmp_path, log.append)
    typed, types = _typed(graph, request, weakly_typed=True)
    assert typed.operators().get("Cast", 0) == casts
    assert "HALF" in types.values()
    assert log == ([f"nothing is quantized: {precision} is built as fp16"] if casts else [])
    assert _typed(graph, request, weakly_typed=False)[0] is graph
