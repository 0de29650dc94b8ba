from __future__ import annotations

import onnx.parser
import pytest

from enginesmith.compiler.quantization.fused import Unfused, unfused

WEIGHTS = "its weight is computed from integers anew on each call"
ISLAND = "computes floats between integer nodes"
HEADER = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>\n'
X = "a = DequantizeLinear(x, s, z)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"(float[2,2] y) {{ {X} w = DequantizeLinear(i, s) y = MatMul(a, w) }}", [Unfused("y", "MatMul", WEIGHTS)]),
        (
            f"(float[2,2] y) {{ {X} c = Constant<value=int8[2,2] {{1,2,3,4}}>() w = DequantizeLinear(c, s) "
            "y = MatMul(a, w) }",
            [Unfused("y", "MatMul", WEIGHTS)],
        ),
        (
            f"(uint8[2,2] y) {{ {X} h = HardSwish(a) y = QuantizeLinear(h, s, z) }}",
            [Unfused("h", "HardSwish", ISLAND)],
        ),
        (f"(uint8[2,2] y) {{ {X} h = Max(a, a) y = QuantizeLinear(h, s, z) }}", [Unfused("h", "Max", ISLAND)]),
        (f"(float[2,2] y) {{ {X} y = HardSwish(a) }}", []),
        (f"(uint8[2,2] y, float[2,2] h) {{ {X} h = HardSwish(a) y = QuantizeLinear(h, s, z) }}", []),
        (f"(uint8[2,2] y) {{ {X} y = QuantizeLinear(a, s, z) }}", []),
        ("(uint8[2,2] y) { y = com.microsoft.QLinearSigmoid(x, s, z, s, z) }", []),
        (f"(float[2,2] y, float[2,2] k) {{ {X} y = Neg(a) k = Neg(f) }}", []),
    ],
)
def test_what_was_not_fused(text, expected):
    text = f"g (uint8[2,2] x) => {text}".replace(
        " {", " <float s = {0.5}, uint8 z = {1}, int8[2,2] i = {1,2,3,4}, float[2,2] f = {1,2,3,4}> {", 1
    )
    assert unfused(onnx.parser.parse_model(HEADER + text).graph) == expected
