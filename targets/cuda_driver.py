"""The CUDA driver's library by ctypes: what running an engine needs, and what doctor wants to know of the GPU.

Needs the standard library only, and must keep working on Python 3.8.
"""

from __future__ import annotations

import ctypes
from typing import Any

u64 = ctypes.c_uint64


class Failure(Exception):  # noqa: N818 - it is no error of the program
    """What cannot be done, and why; `kind` is "unavailable", "mismatch", "data", "storage" or "failed"."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


class Driver:
    """The CUDA driver's library. It comes with every driver, where CUDA's runtime library may be missing."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise Failure("unavailable", "no NVIDIA driver (libcuda.so.1 was not found)") from error
        self("cuInit", 0)
        self.device = ctypes.c_int()
        self("cuDeviceGet", ctypes.byref(self.device), 0)

    def __call__(self, function: str, *arguments: Any) -> None:
        """Calls a function of the driver; 64-bit arguments must be wrapped, as ctypes passes integers as 32-bit.

        Raises:
            Failure: the driver's error by name.
        """
        status = getattr(self._library, function)(*arguments)
        if status:
            name = ctypes.c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(name))
            kind = "unavailable" if function in ("cuInit", "cuDeviceGet") else "failed"
            raise Failure(kind, f"{function} failed: {(name.value or b'unknown error').decode()} ({status})")


def gpu() -> dict[str, str | None]:
    """Name and compute capability of the first GPU and the CUDA version of the driver, or "gpu_error"."""
    found: dict[str, str | None] = {"gpu": None, "compute_capability": None, "driver": None, "gpu_error": None}
    try:
        driver = Driver()
    except Failure as failure:
        return {**found, "gpu_error": str(failure)}
    number, text = ctypes.c_int(), ctypes.create_string_buffer(256)
    driver("cuDriverGetVersion", ctypes.byref(number))
    found["driver"] = f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"
    driver("cuDeviceGetName", text, len(text), driver.device)
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        driver("cuDeviceGetAttribute", ctypes.byref(number), attribute, driver.device)
        capability.append(str(number.value))
    return {**found, "gpu": text.value.decode(), "compute_capability": ".".join(capability)}


def allocate(driver: Driver, size: int) -> u64:
    """Memory on the device, never empty, since TensorRT takes no null address."""
    pointer = u64()
    driver("cuMemAlloc_v2", ctypes.byref(pointer), u64(max(size, 1)))
    return pointer
