"""What the GPU does meanwhile, by NVML: utilisation, memory and SM clock. None where there is no NVML."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, TracebackType
from typing import Any

PERIOD_S = 0.05


@dataclasses.dataclass(frozen=True)
class GpuUse:
    """Means over a stretch of time; None where NVML did not tell."""

    utilization_percent: float | None = None
    sm_clock_mhz: float | None = None


class GpuMonitor:
    """Reads the GPU that CUDA calls device 0. A context manager; without NVML or GPU every reading is None."""

    def __init__(self) -> None:
        self._nvml: ModuleType | None = None
        self._handle: Any = None

    def __enter__(self) -> GpuMonitor:
        try:
            import pynvml
        except ImportError:
            return self
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return self
        self._nvml = pynvml
        with contextlib.suppress(pynvml.NVMLError):
            self._handle = _first_visible(pynvml)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._nvml is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
        self._nvml = self._handle = None

    def memory_bytes(self) -> int | None:
        """Memory in use on the whole device."""
        used = self._read(lambda nvml: nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        return None if used is None else int(used)

    def free_bytes(self) -> int | None:
        """Memory that is free on the device."""
        free = self._read(lambda nvml: nvml.nvmlDeviceGetMemoryInfo(self._handle).free)
        return None if free is None else int(free)

    @contextlib.contextmanager
    def sampling(self, period_s: float = PERIOD_S) -> Iterator[Callable[[], GpuUse]]:
        """Samples in a thread; the yielded function gives the means, and is to be called after the block.

        NVML averages utilisation over up to one second back, so a stretch should be longer, and only the second half
        of the samples counts.
        """
        utilization: list[float] = []
        clock: list[float] = []
        done = threading.Event()

        def sample() -> None:
            while not done.wait(period_s):
                _append(utilization, self._read(lambda nvml: nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu))
                _append(clock, self._read(lambda nvml: nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM)))

        thread = threading.Thread(target=sample, name="gpu-monitor", daemon=True)
        if self._handle is not None:
            thread.start()
        try:
            yield lambda: GpuUse(_late_mean(utilization), _late_mean(clock))
        finally:
            done.set()
            if thread.ident is not None:
                thread.join()

    def _read(self, read: Callable[[Any], Any]) -> Any:
        if self._nvml is None or self._handle is None:
            return None
        try:
            return read(self._nvml)
        except self._nvml.NVMLError:  # a reading that this GPU or container does not give
            return None


def _first_visible(nvml: Any) -> Any:
    """The device that CUDA calls 0; CUDA_VISIBLE_DEVICES holds indices or UUIDs, and "" or "-1" for no device."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if visible in ("", "-1"):
        return None
    if visible.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(visible))
    return nvml.nvmlDeviceGetHandleByUUID(visible)


def _append(samples: list[float], value: Any) -> None:
    if value is not None:
        samples.append(float(value))


def _late_mean(samples: list[float]) -> float | None:
    late = samples[len(samples) // 2 :]
    return statistics.fmean(late) if late else None
