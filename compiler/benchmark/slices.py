"""One candidate under measurement: warmed up to a steady state, then timed slice by slice."""

from __future__ import annotations

import math
import statistics
import time

from ...targets.base import Bound
from .gpu_monitor import GpuMonitor, GpuUse

STEADY_WINDOWS = 3
STEADY_SPREAD = 0.05
"""The state is steady once the medians of this many windows in a row lie within this ratio of each other."""

LATE_FACTOR = 2
PARTS = 8
"""A slice runs in this many parts, and ends early once it took that multiple of its time: the machine got busy."""

GPU_SLICE_S = 1.2
"""NVML averages utilisation over up to one second, so its slice must be longer than that."""


class Slices:
    """Bound inputs, warmed up at construction, with the times of the slices kept so far.

    Attributes:
        host_ms: one list of single calls for each slice; device_ms likewise, its lists empty on a CPU.
        steady: whether the warm-up reached a steady state in its time.
    """

    def __init__(self, bound: Bound, slice_s: float, warmup_s: float) -> None:
        self.host_ms: list[list[float]] = []
        self.device_ms: list[list[float]] = []
        self._bound = bound
        self._slice_s = slice_s
        self.steady, call_ms = _warm_up(bound, warmup_s)
        self._calls = max(1, round(1000 * slice_s / call_ms))

    def take(self) -> tuple[list[float], list[float]]:
        """Times a slice. A twentieth runs untimed before: the other candidates have just emptied the caches."""
        if lead := self._calls // 20:
            self._bound.timed(lead)
        host_ms: list[float] = []
        device_ms: list[float] = []
        deadline = time.perf_counter() + LATE_FACTOR * self._slice_s
        part = math.ceil(self._calls / PARTS)
        while (left := self._calls - len(host_ms)) and not (host_ms and time.perf_counter() > deadline):
            host, device = self._bound.timed(min(part, left))
            host_ms += host
            device_ms += device or []
        return host_ms, device_ms

    def keep(self, host_ms: list[float], device_ms: list[float]) -> None:
        """Adds what `take` gave to the result."""
        self.host_ms.append(host_ms)
        self.device_ms.append(device_ms)

    def round_medians(self) -> list[float]:
        """Median host milliseconds of each slice."""
        return [statistics.median(times) for times in self.host_ms]

    def gpu_use(self, gpu: GpuMonitor) -> GpuUse:
        """Utilisation and clock, in an untimed slice of its own."""
        with gpu.sampling() as use:
            deadline = time.perf_counter() + GPU_SLICE_S
            while time.perf_counter() < deadline:
                self._bound.timed(self._calls)
        return use()


def _warm_up(bound: Bound, warmup_s: float) -> tuple[bool, float]:
    """Runs until the state is steady or time is up; returns whether it is, and the milliseconds of a call."""
    bound.timed(1)  # may compile, allocate and load kernels, so it tells nothing about the next call
    call_ms = max(bound.timed(1)[0][0], 1e-4)
    window_ms = 1000 * warmup_s / (2 * STEADY_WINDOWS)
    medians = [call_ms] if call_ms >= window_ms else []
    deadline = time.perf_counter() + warmup_s
    while len(medians) < STEADY_WINDOWS or time.perf_counter() < deadline:
        times, _ = bound.timed(max(1, round(window_ms / call_ms)))
        call_ms = max(statistics.median(times), 1e-4)
        medians.append(call_ms)
        last = medians[-STEADY_WINDOWS:]
        if len(last) == STEADY_WINDOWS and max(last) <= min(last) * (1 + STEADY_SPREAD):
            return True, call_ms
    return False, call_ms
