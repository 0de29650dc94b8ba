from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enginesmith.compiler.sparsity.methods import METHODS, sparsified
from enginesmith.compiler.sparsity.pattern import columns, is_sparse, strongest


def moments(inputs: int, *, correlated: bool = True, seed: int = 0, rows: int = 2000) -> np.ndarray:
    """The Hessian of inputs of different sizes, which go together or not."""
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((inputs, inputs)) if correlated else np.eye(inputs)
    x = generator.standard_normal((rows, inputs)) @ mixing * generator.uniform(0.2, 2, inputs)
    return (x.T @ x).astype(np.float32)


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("weight", "sparse"),
    [
        ([[1, 0, 2, 0, 0, 0, 3, 4]], True),
        ([[0, 0, 0, 0]], True),
        ([[1, 2, 3, 0, 0, 0, 0, 0]], False),  # six zeros, and a group with three weights
        ([[1, 0]], False),
        (np.empty((0, 4)), False),
    ],
)
def test_of_each_four_weights_two_at_least_are_zero(weight, sparse):
    assert is_sparse(np.asarray(weight, np.float32)) is sparse


def test_groups_of_a_convolution_lie_along_its_channels():
    weight = np.ones((1, 4, 1, 4), np.float32)
    weight[:, 1:3] = 0
    assert is_sparse(weight)
    assert not is_sparse(weight.transpose(0, 3, 2, 1))


def test_the_two_largest_of_four_stay_and_of_equal_ones_the_first():
    scores = np.array([[3, 1, 4, 1, 5, 5, 5, 5]])
    assert strongest(scores).tolist() == [[True, False, True, False, True, True, False, False]]


@given(st.integers(1, 5), st.integers(1, 9))
def test_columns_put_the_channels_of_one_place_side_by_side(groups, places):
    order = columns(4 * groups, places)
    assert sorted(order) == list(range(4 * groups * places))
    for group in order.reshape(-1, 4):
        channels, at = np.divmod(group, places)
        assert len(set(at)) == 1
        assert channels.tolist() == [channels[0] + step for step in range(4)]
        assert channels[0] % 4 == 0


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(METHODS), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_exactly_two_of_four_stay_by_every_method(method, outputs, groups, kernel, seed):
    weight = normal(outputs, 4 * groups, kernel, kernel, seed=seed)
    hessian = moments(4 * groups * kernel**2, seed=seed)
    found = sparsified(weight, hessian, [method])
    assert found.method == method
    grouped = found.weight.reshape(outputs, groups, 4, -1)
    assert (np.count_nonzero(grouped, axis=2) == 2).all()
    if method != "sparsegpt":
        np.testing.assert_array_equal(found.weight[found.weight != 0], weight[found.weight != 0])


@pytest.mark.parametrize("shape", [(32, 64), (16, 16, 3, 3), (8, 300)])
def test_each_method_is_better_than_the_simpler_one_on_inputs_that_go_together(shape):
    weight, hessian = normal(*shape), moments(math.prod(shape[1:]))
    errors = {method: sparsified(weight, hessian, [method]).output_error for method in METHODS}
    assert errors["sparsegpt"] < 0.8 * errors["wanda"]
    assert errors["wanda"] < 0.95 * errors["magnitude"]
    best = sparsified(weight, hessian, METHODS)
    assert (best.method, best.output_error) == ("sparsegpt", errors["sparsegpt"])


def test_the_error_is_that_of_the_products():
    weight, x = normal(8, 16), normal(500, 16, seed=2) @ normal(16, 16, seed=3)
    found = sparsified(weight, x.T @ x, ["wanda"])
    expected = np.linalg.norm(x @ (weight - found.weight).T) / np.linalg.norm(x @ weight.T)
    assert found.output_error == pytest.approx(expected, rel=1e-4)
    assert found.weight_error == pytest.approx(np.linalg.norm(weight - found.weight) / np.linalg.norm(weight))


def test_wanda_and_magnitude_are_one_where_all_inputs_are_alike():
    weight = normal(8, 16)
    found = [sparsified(weight, np.eye(16, dtype=np.float32), [method]).weight for method in METHODS]
    np.testing.assert_array_equal(found[1], found[2])
    np.testing.assert_array_equal(found[0], found[2])  # nothing to make up with either


def test_without_data_the_magnitude_decides():
    weight = normal(8, 16)
    found = sparsified(weight, None, METHODS)
    assert (found.method, found.output_error) == ("magnitude", None)
    np.testing.assert_array_equal(found.weight != 0, strongest(np.abs(weight)))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_inputs_that_the_data_never_used_go_first_and_by_magnitude(method):
    weight, hessian = normal(8, 8), moments(8, correlated=False)
    hessian[:2] = hessian[:, :2] = 0  # two of the first group
    hessian[4:] = hessian[:, 4:] = 0  # all of the second
    kept = sparsified(weight, hessian, [method]).weight != 0
    assert kept[:, :4].tolist() == [[False, False, True, True]] * 8
    np.testing.assert_array_equal(kept[:, 4:], strongest(np.abs(weight[:, 4:])))


def test_data_of_zeros_alone_leave_the_magnitude():
    weight = normal(4, 8)
    found = sparsified(weight, np.zeros((8, 8), np.float32), ["wanda"])
    assert found.output_error is None
    np.testing.assert_array_equal(found.weight != 0, strongest(np.abs(weight)))
