from __future__ import annotations

import numpy as np
import pytest

from enginesmith.compiler.quantization.onnxruntime import plan
from enginesmith.compiler.quantization.parameters import BIAS_LARGEST, activation_parameters
from enginesmith.compiler.quantization.weights import fit_biases, quantize_biases, round_weights, weight_ranges

GROUPED = """g (float[N,4,6,6] x, float[8,2,3,3] w, float[8] b) => (float[N,8,4,4] y)
    { y = Conv<group=2>(x, w, b) }"""
MATRIX = "g (float[N,6] x, float[6,8] w) => (float[N,8] y) { h = Gemm(x, w) y = Erf(h) }"
TRANSPOSED = "g (float[N,6] x, float[8,6] w) => (float[N,8] y) { h = Gemm<transB=1>(x, w) y = Erf(h) }"


class Samples(list):
    description = "made up"
    random = False


def samples(graph) -> Samples:
    """Inputs whose channels go together, so that rounding one weight can make up for another."""
    generator = np.random.default_rng(0)
    shape = [d if isinstance(d, int) else 64 for d in graph.model.graph.inputs[0].shape]
    common = generator.standard_normal((shape[0], 1, *shape[2:]))
    return Samples([{"x": (common + 0.3 * generator.standard_normal(shape)).astype(np.float32)}])


@pytest.mark.parametrize("text", [GROUPED, MATRIX, TRANSPOSED])
def test_gptq_stays_on_the_grid_and_near_the_weights(weighted, text):
    graph = weighted(text)
    planned = plan(graph)
    ranges = weight_ranges(planned.weights, search=False, reduce_range=False)
    (weight,) = planned.weights
    array = weight.value.const_value.numpy()
    nearest, better = (round_weights(graph, ranges, r, samples(graph))[weight] for r in ("nearest", "gptq"))
    assert better.array.shape == array.shape
    assert better.array.dtype == np.int8
    assert (better.array != nearest.array).any()
    steps = ranges[weight].along(ranges[weight].scale, array.ndim)
    assert (np.abs(better.real() - array) <= 6 * steps).all()


def test_gptq_changes_the_results_less(weighted):
    graph = weighted(MATRIX)
    planned = plan(graph)
    ranges = weight_ranges(planned.weights, search=False, reduce_range=False)
    (weight,) = planned.weights
    x = samples(graph)[0]["x"]
    exact = x @ weight.value.const_value.numpy()
    errors = [
        np.square(x @ round_weights(graph, ranges, rounding, samples(graph))[weight].real() - exact).sum()
        for rounding in ("nearest", "gptq")
    ]
    assert errors[1] < 0.5 * errors[0]


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
