"""What stays in float32 by rule: each rule where it fires, and where it does not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from enginesmith.compiler.calibration import Calibration
from enginesmith.passes.cast import Cast

LATE = '<ir_version: 10, opset_import: ["": 21]>\n'


class Samples(list):
    description = "made up"
    random = False


@pytest.fixture
def stay(read, context):
    """The nodes that stay, by name, and why; with the statistics of a calibration."""

    def apply(text: str, inputs: dict[str, object], to: str = "fp16", keep: tuple[str, ...] = ()) -> dict[str, str]:
        arrays = {name: np.asarray(array, np.float32) for name, array in inputs.items()}
        samples, graph = Samples([arrays]), read(text)
        given = dataclasses.replace(context(graph, samples), calibration=Calibration(samples))
        result = Cast(to=to, keep=keep)(graph, given)
        return {refusal.node: refusal.reason for refusal in result.refusals}

    return apply


NORM = """g (float[N,4] x) => (float[N,4] y) <float two = {2}, float e = {0.00001}> {
    [heavy] h = Neg(x)  [square] s = %s  [mean] m = ReduceMean<axes = [1]>(s)
    [add] v = Add(m, e)  [root] r = Sqrt(v)  [divide] y = Div(h, r) }"""


@pytest.mark.parametrize("square", ["Pow(h, two)", "Mul(h, h)"])
def test_sum_of_squares_stays_with_its_root(stay, square):
    found = stay(NORM % square, {"x": np.ones((2, 4))})
    assert found.keys() == {"square", "mean", "add", "root", "divide"}
    assert found["square"] == "is summed, and its range is wide"
    assert found["root"] == "sums squares or exponentials"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("g (float[N,4] x) => (float[N,1] y) { [norm] n = ReduceL2<axes = [1]>(x)  [neg] y = Neg(n) }", {"norm"}),
        ("g (float[N,4] x) => (float[N,4] y) { [exp] e = Exp(x)  [sum] s = ReduceSum(e)  [divide] y = Div(e, s) }",
         {"exp", "sum", "divide"}),
        ("g (float[N,4] x) => (float[N,4] y) { [softmax] s = Softmax(x)  [neg] y = Neg(s) }", set()),
        ("g (float[N,4] x) => (float[N,1] y) { [mean] y = ReduceMean<axes = [1]>(x) }", set()),
    ],
)  # fmt: skip
def test_norms_and_softmax_in_pieces(stay, text, names):
    assert stay(text, {"x": np.ones((2, 4))}).keys() == names


@pytest.mark.parametrize(("length", "to", "kept"), [(2049, "fp16", 1), (2048, "fp16", 0), (257, "bf16", 1)])
def test_long_sums(stay, length, to, kept):
    text = f"g (float[N,{length}] x) => (float[N] y) {{ [mean] y = ReduceMean<axes = [1], keepdims = 0>(x) }}"
    found = stay(text, {"x": np.ones((2, length))}, to)
    assert len(found) == kept
    assert not kept or found["mean"].startswith(f"sums {length} numbers, and ")


def test_long_cumulative_sum(stay):
    text = "g (float[N,4096] x) => (float[N,4096] y) <int64 axis = {1}> { [sum] y = CumSum(x, axis) }"
    assert stay(text, {"x": np.zeros((1, 4096))})["sum"].startswith("sums 4096 numbers")


@pytest.mark.parametrize(("exponent", "kept"), [("k", {"pow"}), ("five", {"pow"}), ("three", set())])
def test_powers(stay, exponent, kept):
    text = f"""g (float[N] x, float[N] k) => (float[N] y) <float five = {{5}}, float three = {{3}}> {{
        [pow] p = Pow(x, {exponent})  [neg] y = Neg(p) }}"""
    assert stay(text, {"x": [1, 2], "k": [1, 1]}).keys() == kept


@pytest.mark.parametrize(("largest", "kept"), [(40000, True), (30000, False), (-40000, False), (-70000, True)])
def test_overflow_has_some_room(stay, largest, kept):
    text = "g (float[N] x) => (float[N] y) <float k = {2}> { [twice] n = Mul(x, k)  [tanh] y = Tanh(n) }"
    found = stay(text, {"x": [1, largest / 2]})
    assert found.keys() == ({"twice", "tanh"} if kept else set())
    assert not kept or found["tanh"] == f"tensor 'n' reaches {abs(largest):.3g} on the data, float16 ends at 65504"


def test_tensors_without_digits(stay):
    text = (
        "g (float[N] x) => (float[N] y) <float k = {0.000002}> { [tiny] t = Mul(x, k)  [neg] n = Neg(t)  y = Exp(n) }"
    )
    found = stay(text, {"x": [0.5, 1]})
    assert found.keys() == {"tiny", "neg", "y"}
    assert found["tiny"] == "tensor 't' stays below 2e-06 on the data, where float16 loses digits"
    assert not stay(text, {"x": [0.5, 8]})
    assert not stay(text, {"x": [0.5, 1]}, "bf16")


@pytest.mark.parametrize(
    ("end", "kept"), [("Log(r)", True), ("Div(k, r)", True), ("Div(r, k)", False), ("Neg(r)", False)]
)
def test_divisors_that_round_to_zero(stay, end, kept):
    text = f"""g (float[N] x) => (float[N] y) <float k = {{0.5}}> {{
        [abs] a = Abs(x)  [root] r = Sqrt(a)  [end] e = {end}  y = Atan(e) }}"""
    found = stay(text, {"x": [1e-9, 1]})
    assert found.keys() == ({"abs", "root", "end"} if kept else set())
    assert not kept or found["abs"] == "'a', a divisor, falls to 1e-09, which float16 rounds to zero"
    assert not stay(text, {"x": [0, 1]})  # it is divided by zero already


def test_angles_of_positions(stay):
    text = """g (float[N] x) => (float[N] y) <float k = {100}> {
        [scale] a = Mul(x, k)  [sine] s = Sin(a)  [neg] y = Neg(s) }"""
    found = stay(text, {"x": [1, 20]})
    assert found.keys() == {"scale", "sine"}
    assert found["sine"] == "takes the sine of angles that float16 rounds too coarsely"
    assert not stay(text, {"x": [0.01, 0.05]})
    assert stay(text, {"x": [0.01, 0.05]}, "bf16")


QUANTIZED = (
    LATE
    + """g (float[N,2] x) => (float[N,2] y)
    <float s = {0.5}, uint8 z = {0}, int8[2,2] w = {1, 2, 3, 4}, float[2] v = {%s}, int8[2] o = {0, 0}> {
    [before] b = Exp(x)  [q] i = QuantizeLinear(b, s, z)  [dq] d = DequantizeLinear(i, s, z)
    [dqw] f = DequantizeLinear<axis = 1>(w, v, o)  [product] p = MatMul(d, f)  [after] y = Tanh(p) }"""
)


def test_quantized_nodes_are_lowered_with_their_scales(stay):
    assert not stay(QUANTIZED % "0.1, 0.2", {"x": np.ones((1, 2))})


@pytest.mark.parametrize(("scales", "keep"), [("0.1, 0.00001", ()), ("0.1, 0.2", ("product",))])
def test_quantized_nodes_stay_together(stay, scales, keep):
    found = stay(QUANTIZED % scales, {"x": np.ones((1, 2))}, keep=keep)
    assert found.keys() == {"dq", "dqw", "product"}
    reason = "a cast between it and the quantization beside it would break a kernel in integers"
    assert found["dq"] == reason
    expected = {"dqw": "scale 'v' falls to 1e-05, where float16 loses digits"} if not keep else {"dqw": reason}
    assert found["dqw"] == expected["dqw"]


def test_quantized_nodes_of_old_opsets_stay(stay):
    text = (QUANTIZED % "0.1, 0.2").replace('"": 21', '"": 17').replace("ir_version: 10", "ir_version: 8")
    found = stay(text, {"x": np.ones((1, 2))})
    assert found.keys() == {"q", "dq", "dqw", "product"}
    assert found["q"] == "QuantizeLinear takes no float16 at opset 17"
