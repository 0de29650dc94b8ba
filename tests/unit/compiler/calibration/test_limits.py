from __future__ import annotations

import numpy as np
import pytest

from enginesmith.compiler.calibration import METHODS, TensorStatistics, limits
from enginesmith.compiler.calibration.observer import Observer
from enginesmith.compiler.calibration.reductions import Reading

GENERATOR = np.random.default_rng(0)
NORMAL = GENERATOR.standard_normal(100_000).astype(np.float32)


def reading(array: np.ndarray, elements: np.ndarray | None = None) -> Reading:
    flat = np.asarray(array, np.float32).reshape(-1)
    whole = {"low": flat.min(keepdims=True), "high": flat.max(keepdims=True), "mean": flat.mean(keepdims=True)}
    return Reading(size=flat.size, **whole, elements=elements)


def collect(array: np.ndarray) -> TensorStatistics:
    observer = Observer(None, 0.01)
    observer.add(reading(array, np.asarray(array, np.float32)))
    return observer.result()


def error(array: np.ndarray, low: float, high: float, levels: int = 256, *, symmetric: bool = False) -> float:
    if symmetric:
        step = high / 127
        number = np.clip(np.rint(array / step), -127, 127)
    else:
        step = (high - low) / (levels - 1)
        zero = round(-low / step)
        number = np.clip(np.rint(array / step), -zero, levels - 1 - zero)
    return float(np.mean((number * step - array) ** 2))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("array", [NORMAL, NORMAL + 3, np.abs(NORMAL), -np.abs(NORMAL), np.maximum(NORMAL, 0)])
def test_limits_hold_zero_and_nothing_beyond_the_data(method, symmetric, array):
    low, high = limits(collect(array), method, symmetric=symmetric)
    assert low <= 0 <= high
    assert low < high
    if symmetric:
        assert low == -high
        assert high <= np.abs(array).max()
    else:
        assert low >= min(array.min(), 0)
        assert high <= max(array.max(), 0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_constant_zero(method, symmetric):
    assert limits(collect(np.zeros(10, np.float32)), method, symmetric=symmetric) == (0, 0)


def test_percentile():
    low, high = limits(collect(NORMAL), "percentile", symmetric=False, percentile=99)
    np.testing.assert_allclose([low, high], np.percentile(NORMAL, [0.5, 99.5]), rtol=0.01)
    low, high = limits(collect(NORMAL), "percentile", symmetric=True, percentile=99)
    np.testing.assert_allclose(high, np.percentile(np.abs(NORMAL), 99), rtol=0.01)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("array", [NORMAL, NORMAL**3, np.maximum(NORMAL, 0) ** 3, NORMAL + 2])
def test_mse_is_the_least_error_of_a_fine_search(array, symmetric):
    low, high = limits(collect(array), "mse", symmetric=symmetric)
    found = error(array, low, high, symmetric=symmetric)
    top, bottom = max(array.max(), 0), min(array.min(), 0)
    lows = -np.geomspace(1, 1 / 50, 60) * -bottom if not symmetric and bottom < 0 else [0.0]
    highs = np.geomspace(1, 1 / 50, 60) * (max(top, -bottom) if symmetric else top)
    best = min(error(array, a, b, symmetric=symmetric) for a in lows[:: 1 if symmetric else 4] for b in highs[::2])
    assert found <= 1.03 * best
    assert found < error(array, *limits(collect(array), "minmax", symmetric=symmetric), symmetric=symmetric)


@pytest.mark.parametrize("symmetric", [False, True])
def test_entropy_cuts_far_outliers(symmetric):
    array = np.concatenate([NORMAL, np.float32([100, -100])])
    low, high = limits(collect(array), "entropy", symmetric=symmetric)
    assert 2 < high < 20
    assert -20 < low < -2


def test_moving_average():
    observer = Observer(None, 0.5)
    for array in ([-1.0, 4.0], [-3.0, 8.0]):
        observer.add(reading(np.float32(array)))
    assert limits(observer.result(), "moving-average", symmetric=False) == (-2, 6)
    assert limits(observer.result(), "moving-average", symmetric=True) == (-6, 6)
    assert limits(observer.result(), "minmax", symmetric=False) == (-3, 8)
    with pytest.raises(ValueError, match="method 'mse' needs a histogram"):
        limits(observer.result(), "mse", symmetric=False)


@pytest.mark.parametrize("method", METHODS)
def test_extremes_that_are_not_among_the_elements(method):
    observer = Observer(None, 0.01)
    observer.add(reading(np.float32([-1, 0, 0, 2]), np.zeros(2, np.float32)))
    low, high = limits(observer.result(), method, symmetric=False)
    assert -1 <= low <= 0 <= high <= 2
