"""What every test runs under: one thread for each library, a cache of its own, and GPU tests only on a GPU."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when NumPy, torch and ONNX Runtime are imported
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # else each process compiles a program to see what it can

import pynvml
import pytest


def _gpus() -> int:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    return pynvml.nvmlDeviceGetCount()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _gpus():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


def pytest_collection_finish() -> None:
    """Millions of objects are there to stay, modules above all: no garbage collection has to look at them again.

    What torch's exporter can translate is the same for each model too.
    """
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """At its end, Python collects what libraries wait for."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of tests that ask for no other, shared by the workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared-cache"
    (root / "captures").mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGINESMITH_CACHE", str(root))
        yield root


@pytest.fixture
def own_cache(tmp_path: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new cache that shares no more with other tests than exports of models, which are checked at each use."""
    root = tmp_path / "cache"
    root.mkdir()
    (root / "captures").symlink_to(shared_cache / "captures")
    monkeypatch.setenv("ENGINESMITH_CACHE", str(root))
    return root
