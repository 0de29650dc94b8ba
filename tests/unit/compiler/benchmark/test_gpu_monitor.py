import itertools
import sys
import threading
from types import SimpleNamespace

import pytest

from enginesmith.compiler.benchmark.gpu_monitor import GpuMonitor, GpuUse


class NvmlError(Exception):
    pass


def refuse(*_):
    raise NvmlError


def fake_nvml(**changes):
    enough = threading.Event()
    readings = itertools.count(1)

    def utilization(handle):
        if next(readings) == 6:
            enough.set()
        return SimpleNamespace(gpu=85)

    clocks = iter([100.0] + [1980.0] * 10**4)
    functions = {
        "enough": enough,
        "NVMLError": NvmlError,
        "NVML_CLOCK_SM": 1,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: f"gpu {index}",
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=123, free=456),
        "nvmlDeviceGetUtilizationRates": utilization,
        "nvmlDeviceGetClockInfo": lambda handle, kind: next(clocks),
    }
    return SimpleNamespace(**{**functions, **changes})


def sample(wait=lambda: None):
    with GpuMonitor() as monitor:
        with monitor.sampling(period_s=0.001) as use:
            wait()
        return monitor.memory_bytes(), use()


@pytest.mark.parametrize("nvml", [None, fake_nvml(nvmlInit=refuse), fake_nvml(nvmlDeviceGetHandleByIndex=refuse)])
def test_without_nvml_driver_or_device_readings_are_none(monkeypatch, nvml):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert sample() == (None, GpuUse(None, None))


def test_readings_are_means_of_the_later_half(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = fake_nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert sample(nvml.enough.wait) == (123, GpuUse(85.0, 1980.0))


def test_a_reading_that_is_refused_is_none_and_the_others_are_kept(monkeypatch):
    nvml = fake_nvml(nvmlDeviceGetClockInfo=refuse)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert sample(nvml.enough.wait) == (123, GpuUse(85.0, None))


@pytest.mark.parametrize(
    ("visible", "handle"), [("0", "gpu 0"), ("3,1", "gpu 3"), ("GPU-ab12", "GPU-ab12"), ("", None), ("-1", None)]
)
def test_the_device_is_the_first_that_cuda_sees(monkeypatch, visible, handle):
    seen = []
    nvml = fake_nvml(nvmlDeviceGetMemoryInfo=lambda chosen: seen.append(chosen) or SimpleNamespace(used=1))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with GpuMonitor() as monitor:
        monitor.memory_bytes()
    assert seen == ([handle] if handle else [])


def test_free_memory_is_told_where_there_is_a_device(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    with GpuMonitor() as monitor:
        assert monitor.free_bytes() == 456
    assert monitor.free_bytes() is None
