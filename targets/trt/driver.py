"""The CUDA driver's library by ctypes: what running an engine needs, and what doctor wants to know of the GPU.

Needs the standard library only.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

u64 = ctypes.c_uint64

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


class Failure(Exception):  # noqa: N818 - it is no error of the program
    """What cannot be done, and why; `kind` is "unavailable", "mismatch", "data", "storage" or "failed"."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


class Driver:
    """The CUDA driver's library. It comes with every driver, where CUDA's runtime library may be missing.

    Args:
        device: which GPU, by CUDA's number.
    """

    def __init__(self, device: int = 0) -> None:
        try:
            self._library = _library()
        except OSError as error:
            raise Failure("unavailable", f"the NVIDIA driver cannot be loaded: {error}") from error
        self("cuInit", 0)
        self.device = ctypes.c_int()
        self("cuDeviceGet", ctypes.byref(self.device), device)

    def __call__(self, function: str, *arguments: Any) -> None:
        """Calls a function of the driver; 64-bit arguments must be wrapped, as ctypes passes integers as 32-bit.

        Raises:
            Failure: the driver's error in its own words.
        """
        status = getattr(self._library, function)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            kind = "unavailable" if function in ("cuInit", "cuDeviceGet") else "failed"
            reason = (text.value or b"unknown error").decode()
            raise Failure(kind, f"{function} of the NVIDIA driver failed: {reason} ({status})")

    def version(self) -> str:
        """The newest CUDA version that the driver supports, for instance "13.0"."""
        number = ctypes.c_int()
        self("cuDriverGetVersion", ctypes.byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    def compute_capability(self, device: int = 0) -> str:
        """Compute capability of a device, for instance "9.0"."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self("cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
        self("cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, device)
        return f"{major.value}.{minor.value}"


def gpu() -> dict[str, str | None]:
    """Name and compute capability of the first GPU and the CUDA version of the driver, or "gpu_error"."""
    found: dict[str, str | None] = {"gpu": None, "compute_capability": None, "driver": None, "gpu_error": None}
    try:
        driver = Driver()
    except Failure as failure:
        return {**found, "gpu_error": str(failure)}
    text = ctypes.create_string_buffer(256)
    driver("cuDeviceGetName", text, len(text), driver.device)
    found["gpu"], found["compute_capability"] = text.value.decode(), driver.compute_capability()
    found["driver"] = f"CUDA {driver.version()}"
    return found


def allocate(driver: Driver, size: int) -> u64:
    """Memory on the device, never empty, since TensorRT takes no null address."""
    pointer = u64()
    driver("cuMemAlloc_v2", ctypes.byref(pointer), u64(max(size, 1)))
    return pointer


def _library() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
