"""What a result depends on beside the model: machine, driver, packages. What a machine lacks is left out."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from ...targets.cuda import driver

PACKAGES = (
    "enginesmith", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "onnxscript", "onnxsim", "openvino",
    "polygraphy", "safetensors", "tensorrt", "tensorrt-rtx", "torch", "transformers",
    "nvidia-cublas", "nvidia-cublas-cu12", "nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12",
    "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
)  # fmt: skip

ISA_FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
"""Flags of the processor that kernels are chosen by, as Linux names them."""

_SIMD = re.compile(r"avx|amx|fma|f16c|sse|bmi|asimd|sve")
_CPU_INFO = Path("/proc/cpuinfo")
_MACHINE_ID = Path("/etc/machine-id")


def environment() -> dict[str, Any]:
    """The machine for the manifest: `os`, `python`, `packages`, `cpu`, `memory_bytes`, `cuda` and `gpus`.

    Keys of the cache hold it, so what this process has imported must not show in it.
    """
    found = {
        "os": " ".join((platform.system(), platform.machine(), *platform.libc_ver())),
        "python": platform.python_version(),
        "packages": _packages(),
        "cpu": _cpu(),
        "memory_bytes": _memory_bytes(),
        "cuda": _cuda_versions(),
        "gpus": gpus(),
    }
    return {key: value for key, value in found.items() if value}


def identity() -> str:
    """Tells this machine from another of the same kind: its name, and the id that its system was given when installed.

    A container is a machine of its own. For keys of what was measured; it is shown to nobody.
    """
    try:
        installed = _MACHINE_ID.read_text().strip()
    except OSError:
        installed = ""
    return hashlib.sha256(f"{platform.node()} {installed}".encode()).hexdigest()


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability and memory of each NVIDIA GPU that NVML shows; empty without pynvml or a driver."""
    nvml = _nvml()
    if nvml is None:
        return []
    try:
        return [_gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return []
    finally:
        nvml.nvmlShutdown()


def compute_capability(device: int = 0) -> str | None:
    """Compute capability of the device as CUDA numbers it ("9.0"); None where there is none."""
    return driver.compute_capability(device)


def cpu_flags() -> frozenset[str]:
    """All flags of the processor, as Linux names them; empty where they cannot be read."""
    info = _cpu_info()
    return frozenset((info.get("flags") or info.get("Features") or "").split())


def simd_flags() -> tuple[str, ...]:
    """Those of the flags that name instructions for vectors and matrices, which compiled kernels need."""
    return tuple(sorted(flag for flag in cpu_flags() if _SIMD.match(flag)))


def processors() -> int:
    """How many processors this process may use: those of a core count each."""
    return _allowed() or 1


def cores() -> int:
    """How many physical cores this process may use."""
    import psutil

    return min(psutil.cpu_count(logical=False) or 1, _allowed() or 1)


def _packages() -> dict[str, str]:
    found = ((name, version(name)) for name in PACKAGES)
    return {name: version for name, version in found if version}


def version(package: str) -> str | None:
    """Version of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    flags = cpu_flags()
    found = {
        "model": _cpu_info().get("model name") or platform.processor() or platform.machine(),
        "machine": platform.machine(),
        "cores": _allowed(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
    }
    return {key: value for key, value in found.items() if value}


def _allowed() -> int | None:
    """How many processors this process may run on; None where that is not known."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()


def _cpu_info() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is none."""
    try:
        first = _CPU_INFO.read_text().split("\n\n")[0]
    except OSError:
        return {}
    lines = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # no sysconf on Windows, no such name elsewhere
        return None


def _cuda_versions() -> dict[str, str]:
    found = {}
    nvml = _nvml()
    if nvml is not None:
        try:
            found["driver"] = nvml.nvmlSystemGetDriverVersion()
            number = nvml.nvmlSystemGetCudaDriverVersion()
            found["driver_supports"] = f"{number // 1000}.{number % 1000 // 10}"
        except nvml.NVMLError:
            pass
        finally:
            nvml.nvmlShutdown()
    return found


def _nvml() -> Any:
    """pynvml, initialised; None where it or the driver is missing."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _gpu(nvml: Any, handle: Any) -> dict[str, Any]:
    return {
        "name": nvml.nvmlDeviceGetName(handle),
        "compute_capability": ".".join(map(str, nvml.nvmlDeviceGetCudaComputeCapability(handle))),
        "memory_bytes": nvml.nvmlDeviceGetMemoryInfo(handle).total,
    }
