"""The CUDA driver of this process, and the devices that it shows."""

from __future__ import annotations

import ctypes
import functools

from ...errors import EngineError
from ..trt.driver import Driver, Failure


@functools.cache
def _driver() -> Driver:
    return Driver()


def call(function: str, *arguments: object) -> None:
    """Calls a function of the driver; 64-bit arguments must be wrapped, as ctypes passes integers as 32-bit.

    Raises:
        EngineError: the call failed, or there is no driver or no device.
    """
    try:
        _driver()(function, *arguments)
    except Failure as failure:
        raise EngineError(str(failure)) from failure


def problem() -> str:
    """Why no CUDA device can be used, in a sentence; empty where one can."""
    try:
        _driver()
    except Failure as failure:
        return str(failure)
    return ""


def count() -> int:
    """Devices that CUDA_VISIBLE_DEVICES leaves visible."""
    number = ctypes.c_int()
    call("cuDeviceGetCount", ctypes.byref(number))
    return number.value


def compute_capability(device: int = 0) -> str | None:
    """Compute capability of a device, for instance "9.0"; None where there is no such device."""
    try:
        return _driver().compute_capability(device)
    except Failure:
        return None


def driver_version() -> str:
    """The newest CUDA version that the driver supports, for instance "13.0"."""
    return _driver().version()
