from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from enginesmith.compiler.alignment.lanes import FINITE, UNSAFE, ZERO, Lane, Operand, computed, join, of


def operand(number: float | None = None, array: np.ndarray | None = None, dtype: str = "FLOAT") -> Operand:
    lane = Lane(number) if array is None else None
    return Operand(lane, array, ir.DataType[dtype])


def node(operator: str, inputs: int, **attributes: float) -> ir.Node:
    return ir.node(operator, [ir.val(f"i{place}") for place in range(inputs)], attributes=attributes)


@pytest.mark.parametrize(
    ("operator", "number", "expected"),
    [
        ("Relu", 0, 0), ("Sigmoid", 0, 0.5), ("Exp", 0, 1), ("Log", 1, 0), ("Cos", 0, 1), ("Gelu", 0, 0),
        ("Softsign", 1, 0.5), ("Neg", 3, -3),
    ],
)  # fmt: skip
def test_functions_of_a_number(operator, number, expected):
    assert computed(node(operator, 1), [operand(number)], 20) == Lane(expected)


@pytest.mark.parametrize(
    ("operator", "numbers"), [("Log", [0]), ("Reciprocal", [0]), ("Div", [0, 0]), ("Pow", [0, -1]), ("Sqrt", [-1])]
)
def test_what_is_not_finite_is_unsafe(operator, numbers):
    assert computed(node(operator, len(numbers)), [operand(number) for number in numbers], 20) == UNSAFE


def test_attributes_count():
    assert computed(node("Elu", 1, alpha=2.0), [operand(0)], 20) == ZERO
    assert computed(node("ThresholdedRelu", 1, alpha=-1.0), [operand(-0.5)], 20) == Lane(-0.5)


def test_inputs_that_are_left_out_stay_out():
    assert computed(node("Clip", 3), [operand(5), None, operand(array=np.float32(2))], 20) == Lane(2)


def test_older_opsets():
    assert computed(node("Clip", 1, min=1.0, max=2.0), [operand(0)], 9) == Lane(1)


def test_a_constant_of_several_numbers_makes_several():
    assert computed(node("Add", 2), [operand(1), operand(array=np.float32([1, 2, 3]))], 20) == FINITE
    assert computed(node("Mul", 2), [operand(0), operand(array=np.float32([1, 2, 3]))], 20) == ZERO
    assert computed(node("Div", 2), [operand(1), operand(array=np.float32([1, 0]))], 20) == UNSAFE


def test_whole_numbers_and_truth_values_keep_their_types():
    assert computed(node("Not", 1), [operand(0, dtype="BOOL")], 20) == Lane(1)
    assert computed(node("Div", 2), [operand(7, dtype="INT64"), operand(2, dtype="INT64")], 20) == Lane(3)
    chosen = [operand(1, dtype="BOOL"), operand(5), operand(0)]
    assert computed(node("Where", 3), chosen, 20) == Lane(5)


def test_what_is_not_known_is_not_computed():
    assert computed(node("Add", 2), [operand(1), Operand(FINITE, None, ir.DataType.FLOAT)], 20) is None
    assert computed(node("Add", 2), [operand(1), Operand(None, None, ir.DataType.FLOAT)], 20) is None
    assert computed(ir.node("FastGelu", [ir.val("x")], domain="com.microsoft"), [operand(0)], 20) is None
    assert computed(node("BitwiseNot", 1), [operand(0)], 20) is None  # of floats there is none


def test_joining():
    assert join([ZERO, ZERO]) == ZERO
    assert join([ZERO, Lane(1)]) == FINITE
    assert join([ZERO, UNSAFE]) == UNSAFE
    assert join([]) == UNSAFE


def test_arrays():
    assert of(np.float32([[2, 2]])) == Lane(2)
    assert of(np.float32([1, 2])) == FINITE
    assert of(np.float32([1, np.nan])) == UNSAFE
    assert of(np.float32([])) == UNSAFE
