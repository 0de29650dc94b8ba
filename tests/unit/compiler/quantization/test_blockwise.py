from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enginesmith.compiler.quantization.blockwise import compensate, pack, quantize


def weight(rows: int = 70, columns: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(4, (rows, columns)).astype(np.float32)


def error(array: np.ndarray, found: np.ndarray) -> float:
    return float(((array - found) ** 2).sum() / (array**2).sum())


def nearest(array: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Plain rounding with the scale of each block's largest magnitude; rows are whole blocks."""
    blocks = array.T.reshape(array.shape[1], -1, size)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / ((1 << (bits - 1)) - 1)
    return (np.rint(blocks / scale) * scale).reshape(array.shape[1], -1).T


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 5), st.sampled_from((16, 32)), st.sampled_from((4, 8)), st.booleans())
def test_codes_fit_their_bits_and_are_near(rows, columns, size, bits, symmetric):
    array = weight(rows, columns)
    blocks = quantize(array, bits, size, symmetric=symmetric)
    assert blocks.codes.shape == (columns, -(-rows // size), size)
    assert blocks.codes.max() < 1 << bits
    assert (blocks.scale != 0).all()
    assert error(array, blocks.real()) < (0.03 if bits == 4 else 2e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_search_is_better_than_rounding_with_the_largest_magnitude(bits):
    array = weight(256)
    plain = error(array, nearest(array, bits, 32))
    unsigned = error(array, quantize(array, bits, 32, signed_scale=False).real())
    signed = error(array, quantize(array, bits, 32).real())
    affine = error(array, quantize(array, bits, 32, symmetric=False).real())
    assert plain > unsigned > affine
    assert plain > signed > affine
    assert bits == 8 or unsigned > signed


def test_scales_are_positive_on_demand():
    array = weight(256)
    assert (quantize(array, 4, 32).scale < 0).any()
    assert (quantize(array, 4, 32, signed_scale=False).scale > 0).all()


def test_important_rows_err_less():
    array = weight(64)
    importance = np.ones(64)
    importance[:8] = 1000
    plain, weighted = quantize(array, 4, 64).real(), quantize(array, 4, 64, importance=importance).real()
    assert error(array[:8], weighted[:8]) < 0.7 * error(array[:8], plain[:8])


@pytest.mark.parametrize("symmetric", [True, False])
def test_compensation_lowers_the_error_of_products(symmetric):
    random = np.random.default_rng(3)
    array = weight(70)
    x = (random.standard_normal((500, 8)) @ random.standard_normal((8, 70))).astype(np.float32)
    hessian = x.T @ x
    nearest = quantize(array, 4, 32, symmetric=symmetric, importance=np.diag(hessian))
    better = compensate(nearest, array, hessian)
    assert better.codes.max() < 16
    assert error(x @ array, x @ better.real()) < 0.3 * error(x @ array, x @ nearest.real())


def test_compensation_without_data_changes_nothing():
    nearest = quantize(weight(), 4, 32)
    np.testing.assert_array_equal(compensate(nearest, weight(), np.zeros((70, 70))).codes, nearest.codes)


def test_blocks_of_zeros():
    blocks = quantize(np.zeros((40, 2), np.float32), 4, 32, symmetric=False)
    assert np.isfinite(blocks.scale).all()
    assert not blocks.real().any()


def test_many_blocks_are_searched_in_parts(monkeypatch):
    array = weight(64, 10)
    whole = quantize(array, 4, 32)
    monkeypatch.setattr("enginesmith.compiler.quantization.blockwise._ROWS", 6)
    parts = quantize(array, 4, 32)
    np.testing.assert_array_equal(whole.codes, parts.codes)
    np.testing.assert_allclose(whole.scale, parts.scale, rtol=1e-5)


def test_packing_puts_the_first_code_low():
    np.testing.assert_array_equal(pack(np.array([[1, 2, 15]], np.uint8), 4), [[0x21, 0x0F]])
    np.testing.assert_array_equal(pack(np.array([[1, 2, 15]], np.uint8), 8), [[1, 2, 15]])
