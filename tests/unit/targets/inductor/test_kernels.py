"""Kernels compute what torch does. Triton's interpreter runs them here, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from enginesmith.targets.inductor import operators

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that interprets kernels")


@pytest.fixture(autouse=True)
def unwrapped(monkeypatch):
    """Launches take kernels as they are: torch 2.11 wraps none that is interpreted."""
    if INTERPRETED:
        monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: kernel)


@pytest.mark.skipif(INTERPRETED, reason="starts that process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@interpreted
@pytest.mark.parametrize("activation", range(len(operators.ACTIVATIONS)))
@pytest.mark.parametrize("norm", ["", "RMS norm", "layer norm"])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 37, 100), (1, 5, 3000), (1, 4097, 20), (1, 3, 5000), (5, 17, 300)])
def test_products(rows, n, k, norm, activation):
    from enginesmith.targets.inductor import launches

    torch.manual_seed(0)
    x, weight, bias, residual = (
        torch.randn(rows, 1, k),
        torch.randn(n, k) / k**0.5,
        torch.randn(n),
        torch.randn(rows, 1, n),
    )
    around = (bias, residual, torch.randn(k), torch.randn(k) if norm == "layer norm" else None) if norm else [None] * 4
    given = (x, weight, *around, 1e-5, activation)
    torch.testing.assert_close(launches.product(*given), operators.product(*given), atol=1e-5, rtol=1e-5)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "heads", "shared", "width", "length"),
    [
        (3, 2, 1, 24, 300), (3, 2, 3, 24, 130), (1, 1, 19, 8, 70), (67, 2, 1, 8, 70), (67, 2, 2, 24, 20),
    ],
)  # fmt: skip
def test_attention(dtype, rows, heads, shared, width, length):
    from enginesmith.targets.inductor import launches

    torch.manual_seed(0)
    both = torch.randn(rows, heads * (shared + 2), width, dtype=dtype)
    query, key, value = both.split([heads * shared, heads, heads], dim=1)
    caches = [torch.randn(rows, heads, length, width, dtype=dtype) for _ in range(2)]
    copies = [cache.float() for cache in caches]
    entries = torch.randint(0, length, (rows, 2))[:, 0]
    entries[:2] = torch.tensor([length - 1, 0])[:rows]
    expected = operators.attend(query.float(), key.float(), value.float(), *copies, entries, width**-0.5)
    found = launches.attend(query, key, value, *caches, entries, width**-0.5)
    bound = {torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(found.float(), expected, atol=bound, rtol=bound)
    for cache, copy in zip(caches, copies, strict=True):
        assert torch.equal(cache.float(), copy)


@interpreted
def test_the_largest():
    from enginesmith.targets.inductor import launches

    x = torch.randn(3, 5000)
    x[1, 7] = x[1, 4000] = 100.0
    x[2, 9] = torch.nan
    best, token = launches.largest(x)
    assert token.tolist() == [int(x[0].argmax()), 7, 9]
    assert best[0] == x[0].max()
    assert not torch.isfinite(best[2])
