"""What every test runs under: one thread for each library, and GPU tests only where there is a GPU."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when NumPy, torch and ONNX Runtime are imported

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
