from __future__ import annotations

import numpy as np

from enginesmith.compiler.quantization.layers import assign
from enginesmith.compiler.quantization.onnxruntime import plan
from enginesmith.compiler.quantization.parameters import BIAS_LARGEST, activation_parameters
from enginesmith.compiler.quantization.weights import (
    fit_biases,
    quantize_biases,
    round_to_nearest,
    weight_ranges,
    widen_for_biases,
)

GROUPED = """g (float[N,4,6,6] x, float[8,2,3,3] w, float[8] b) => (float[N,8,4,4] y)
    { y = Conv<group=2>(x, w, b) }"""


def test_uses_of_one_weight_have_equal_parameters(weighted):
    graph = weighted("g (float[N,6] x, float[6,6] w) => (float[N,6] y) { h = Gemm(x, w) y = Gemm(h, w) }")
    first, second = weight_ranges(plan(graph).weights, search=True, reduce_range=False).values()
    assert first is second


def test_a_bias_that_overflows_widens_its_weight_alone(weighted):
    graph = weighted(GROUPED)
    planned = plan(graph)
    (bias,) = planned.biases
    ranges = weight_ranges(planned.weights, search=False, reduce_range=False)
    activations = {"x": activation_parameters(-1e-12, 1e-12, planned.dtype, symmetric=False)}
    fitted = fit_biases(planned, ranges, activations)
    assert (fitted[bias.weight].scale > ranges[bias.weight].scale).any()
    stored = quantize_biases(planned, fitted, activations)[bias]
    assert stored.array.dtype == np.int32
    assert np.abs(stored.array.astype(np.int64)).max() <= BIAS_LARGEST
    np.testing.assert_allclose(stored.real(), bias.value.const_value.numpy(), rtol=1e-5)
    normal = {"x": activation_parameters(-1, 1, planned.dtype, symmetric=False)}
    assert fit_biases(planned, ranges, normal) == ranges


def test_a_bias_that_grew_since_widens_its_weight(weighted):
    graph = weighted(GROUPED)
    planned = plan(graph)
    (bias,) = planned.biases
    activations = {"x": activation_parameters(-1, 1, planned.dtype, symmetric=False)}
    weights = round_to_nearest(weight_ranges(planned.weights, search=False, reduce_range=False))
    assert widen_for_biases(planned, weights, activations) == weights
    grown = np.full(8, 1e9, np.float32)
    assign(bias.value, grown)
    widened = widen_for_biases(planned, weights, activations)
    stored = quantize_biases(planned, {w: q.parameters for w, q in widened.items()}, activations)[bias]
    assert np.abs(stored.array.astype(np.int64)).max() <= BIAS_LARGEST
    np.testing.assert_allclose(stored.real(), grown, rtol=1e-5)
    (weight,) = planned.weights
    found = widened[weight]
    assert (found.parameters.scale > weights[weight].parameters.scale).all()
    np.testing.assert_array_equal(found.array, found.parameters.quantize(weight.value.const_value.numpy()))
