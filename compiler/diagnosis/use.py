"""How an engine uses the machine: time of a call, processors, GPU and its memory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ...targets.base import Bound, EngineInfo, Target
from ..benchmark.cpu_monitor import ForeignCpu
from ..benchmark.gpu_monitor import GpuMonitor

WATCHED_S = 0.4
GPU_WATCHED_S = 1.5
"""How long the engine runs to be watched; NVML averages over up to one second."""


@dataclasses.dataclass(frozen=True)
class Use:
    """Over a stretch of calls one after the other. Shares are from 0 to 1; None where nothing tells.

    Attributes:
        call_ms: of a call in the quieter half of all, of the device where it has a clock, else of the host.
        host_ms: likewise, of the host.
        cpu: share of the processors that the engine kept busy.
        foreign_cpu: share of them that other processes took, which makes all times here worth less.
        gpu: share of the time in which the GPU ran a kernel.
        gpu_memory_bytes: in use on the whole device.
        fragmentation: how torch's allocator uses its memory; empty where torch does not run on the GPU.
    """

    call_ms: float
    host_ms: float
    calls: int
    cpu: float
    foreign_cpu: float
    gpu: float | None = None
    gpu_memory_bytes: int | None = None
    sm_clock_mhz: float | None = None
    fragmentation: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "fragmentation": dict(self.fragmentation)}


def observe(target: Target, directory: Path, info: EngineInfo, inputs: Mapping[str, np.ndarray]) -> Use:
    """Runs an engine for a while.

    Raises:
        EngineError: it cannot run here.
    """
    on_gpu = "cpu" not in target.capabilities.devices or info.options.get("device") == "cuda"
    with contextlib.closing(target.runner(directory, info)) as runner:
        return watch(runner.bind(inputs), on_gpu=on_gpu)


def watch(bound: Bound, *, on_gpu: bool) -> Use:
    """Runs bound inputs for a while."""
    bound.timed(3)
    host_ms: list[float] = []
    device_ms: list[float] = []
    with GpuMonitor() as monitor, monitor.sampling() as sampled:
        foreign, process = ForeignCpu(), psutil.Process()
        start, busy = time.perf_counter(), _cpu_s(process)
        while not host_ms or time.perf_counter() - start < (GPU_WATCHED_S if on_gpu else WATCHED_S):
            host, device = bound.timed(1)
            host_ms += host
            device_ms += device or []
        seconds = time.perf_counter() - start
        taken = (_cpu_s(process) - busy) / (seconds * _processors())
        others, memory = foreign.share(), monitor.memory_bytes() if on_gpu else None
        fragments = fragmentation() if on_gpu else {}
    used = sampled()
    return Use(
        call_ms=_quiet(device_ms or host_ms),
        host_ms=_quiet(host_ms),
        calls=len(host_ms),
        cpu=min(1.0, taken),
        foreign_cpu=others,
        gpu=used.utilization_percent / 100 if on_gpu and used.utilization_percent is not None else None,
        gpu_memory_bytes=memory,
        sm_clock_mhz=used.sm_clock_mhz if on_gpu else None,
        fragmentation=fragments,
    )


def fragmentation(stats: Callable[[], Mapping[str, Any]] | None = None) -> dict[str, float]:
    """What torch's allocator holds on the GPU, in bytes, and `share`, the part of it that lies split and idle.

    A block that is split and only partly in use cannot be given back: memory that is reserved, and not there for a
    large tensor.
    """
    if stats is None:
        import torch

        if not torch.cuda.is_available():
            return {}
        stats = torch.cuda.memory_stats
    found = stats()
    names = {
        "allocated_bytes": "allocated_bytes.all.current",
        "reserved_bytes": "reserved_bytes.all.current",
        "inactive_split_bytes": "inactive_split_bytes.all.current",
        "retries": "num_alloc_retries",
    }
    values = {name: float(found.get(key, 0)) for name, key in names.items()}
    if not values["reserved_bytes"]:
        return {}
    return {**values, "share": values["inactive_split_bytes"] / values["reserved_bytes"]}


def _quiet(times: list[float]) -> float:
    """As in `targets.profile.medians`: what disturbs a call makes it longer."""
    return statistics.median(sorted(times)[: (len(times) + 1) // 2])


def _cpu_s(process: psutil.Process) -> float:
    """Of this process and of its children, which run some engines."""
    times = process.cpu_times()
    total = times.user + times.system
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            own = child.cpu_times()
            total += own.user + own.system
    return float(total)


def _processors() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
