from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginesmith.compiler.quantization.parameters import (
    BIAS_LARGEST,
    Parameters,
    activation_parameters,
    bias_parameters,
    weight_parameters,
    widened_for_bias,
)

UINT8, INT8, INT32, FP8 = ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.INT32, ir.DataType.FLOAT8E4M3FN
KINDS = [(UINT8, False), (UINT8, True), (INT8, False), (INT8, True)]
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


@pytest.mark.parametrize(("dtype", "symmetric"), KINDS)
@given(edges=st.tuples(FLOATS, FLOATS))
def test_a_range_is_told_within_a_step(dtype, symmetric, edges):
    low, high = min(edges), max(edges)
    found = activation_parameters(low, high, dtype, symmetric=symmetric)
    assert found.dtype == dtype
    assert np.isfinite(found.scale)
    assert found.scale >= np.finfo(np.float32).tiny
    assert found.round(np.zeros(1, np.float32)) == 0
    values = np.array([low, high, low / 2, high / 3], np.float32)
    assert (np.abs(found.round(values) - values) <= found.scale * 1.01).all()


def test_a_range_is_widened_to_hold_zero():
    found = activation_parameters(2, 4, UINT8, symmetric=False)
    assert found.zero_point == 0
    assert (found.low, found.high) == (0, pytest.approx(4))


@pytest.mark.parametrize("value", [0.0, 1e-44])
@pytest.mark.parametrize(("dtype", "symmetric"), [*KINDS, (FP8, True)])
def test_a_tensor_that_is_always_zero_has_a_scale(dtype, symmetric, value):
    found = activation_parameters(-value, value, dtype, symmetric=symmetric)
    assert found.scale > 1e-4
    assert found.round(np.zeros(3, np.float32)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("high", [6.0, 1.0, 0.1, 3.7])
def test_no_number_lies_above_a_limit_that_a_clip_has(high):
    found = activation_parameters(0, high, UINT8, symmetric=False)
    assert found.dequantize(np.uint8([255])) <= np.float32(high)


def test_symmetric_ranges_have_the_zero_point_in_the_middle():
    assert activation_parameters(-1, 3, UINT8, symmetric=True).zero_point == 128
    assert activation_parameters(-1, 3, INT8, symmetric=True).zero_point == 0
    assert activation_parameters(-1, 3, FP8, symmetric=True).scale == np.float32(3 / 448)


@pytest.mark.parametrize("edges", [(0, np.inf), (np.nan, 1), (2, 1)])
def test_what_is_no_range_is_refused(edges):
    with pytest.raises(ValueError, match="is no range"):
        activation_parameters(*edges, UINT8, symmetric=False)


def test_fp8_saturates_and_rounds_to_its_numbers():
    found = Parameters(np.array(0.5, np.float32), np.array(0, FP8.numpy()))
    assert found.round(np.float32([1e9, -1e9, 0.5, 8.6])).tolist() == [224, -224, 0.5, 9]


def test_integers_round_to_even_and_saturate():
    found = Parameters(np.array(1, np.float32), np.array(10, np.uint8))
    assert found.quantize(np.float32([0.5, 1.5, -99, 999])).tolist() == [10, 12, 0, 255]


def test_weights_have_a_scale_for_each_channel():
    weight = np.float32([[1, -2], [0.5, 0.25]])
    for axis, expected in ((0, [2, 0.5]), (1, [1, 2]), (None, 2)):
        found = weight_parameters(weight, axis, INT8)
        np.testing.assert_allclose(found.scale * 127, expected, rtol=1e-6)
        assert found.scale.shape == found.zero_point.shape
        assert np.abs(found.round(weight) - weight).max() <= found.scale.max() / 2


def test_a_dead_channel_takes_the_scale_of_a_typical_one():
    weight = np.float32([[0, 0], [1, 1], [3, 3], [9, 9]])
    assert weight_parameters(weight, 0, INT8).scale[0] == pytest.approx(3 / 127)
    assert weight_parameters(np.zeros((2, 2), np.float32), 0, INT8).scale.tolist() == pytest.approx([1 / 127] * 2)


def test_reduced_range_uses_seven_bits():
    weight = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)
    found = weight_parameters(weight, 0, INT8, reduce_range=True, search=True).quantize(weight)
    assert np.abs(found.astype(np.int32)).max() == 64


def test_search_clips_an_outlier_where_that_costs_less():
    weight = np.random.default_rng(0).standard_normal((2, 20000)).astype(np.float32)
    weight[1, 7] = 9
    errors = [np.square(p.round(weight) - weight).sum(axis=1) for p in _searched(weight)]
    assert errors[1][1] < 0.9 * errors[0][1]
    assert errors[1][0] <= errors[0][0]


def test_search_heeds_what_an_error_costs():
    weight = np.random.default_rng(0).standard_normal((1, 20000)).astype(np.float32)
    weight[0, 7] = 9
    importance = np.ones(20000, np.float32)
    importance[7] = 1e6
    plain, heeding = (weight_parameters(weight, 0, INT8, search=True, importance=i) for i in (None, importance))
    assert plain.high < 9 <= heeding.high * 1.02


def _searched(weight):
    return [weight_parameters(weight, 0, INT8, search=search) for search in (False, True)]


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_broken_weights_are_refused(broken):
    with pytest.raises(ValueError, match="it holds NaN or Inf"):
        weight_parameters(np.float32([[1, broken]]), 0, INT8)


def test_a_bias_is_told_to_the_last_of_its_steps():
    weight = weight_parameters(np.float32([[1, -2], [0.5, 0.25]]), 0, INT8)
    found = bias_parameters(np.float32(0.01), weight)
    bias = np.float32([123.456, -0.001])
    assert found.dtype == INT32
    np.testing.assert_allclose(found.round(bias), bias, atol=float(found.scale.max()) / 2)


@pytest.mark.parametrize("axis", [0, None])
def test_a_bias_that_overflows_widens_the_scale_of_the_weight(axis):
    weight = weight_parameters(np.float32([[1e-6, 1e-6], [1, 1]]), axis, INT8)
    bias, step = np.float32([1e9, 1]), np.float32(1e-3)
    widened = widened_for_bias(weight, bias, step)
    stored = bias_parameters(step, widened).quantize(bias)
    assert np.abs(stored).max() <= BIAS_LARGEST
    np.testing.assert_allclose(bias_parameters(step, widened).round(bias)[0], bias[0], rtol=1e-6)
    assert widened_for_bias(weight, np.float32([1e-5, 1]), step) is weight
