"""The few calls of the CUDA driver that timing and copying need, through ctypes: no torch and no toolkit.

The driver's streams and events are those of the runtime library, so ONNX Runtime and TensorRT take them as their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator

from ..errors import EngineError

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for work on the default stream
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _call(name: str, *arguments: object) -> None:
    """Calls the driver.

    Raises:
        EngineError: the call failed, or there is no driver.
    """
    try:
        library = _library()
    except OSError as error:
        raise EngineError(f"the NVIDIA driver cannot be loaded: {error}") from error
    code = getattr(library, name)(*arguments)
    if code == 0:
        return
    text = ctypes.c_char_p()
    library.cuGetErrorString(code, ctypes.byref(text))
    raise EngineError(f"{name} of the NVIDIA driver failed: {(text.value or b'unknown error').decode()} ({code})")


def problem() -> str:
    """Why no CUDA device can be used, in a sentence; empty where one can."""
    try:
        _call("cuInit", 0)
        return "" if count() else "the NVIDIA driver shows no device"
    except EngineError as error:
        return error.message


def count() -> int:
    """Devices that CUDA_VISIBLE_DEVICES leaves visible."""
    number = ctypes.c_int()
    _call("cuInit", 0)
    _call("cuDeviceGetCount", ctypes.byref(number))
    return number.value


def compute_capability(device: int = 0) -> str | None:
    """Compute capability of a device, for instance "9.0"; None where there is no such device."""
    value = ctypes.c_int()
    parts = []
    try:
        _call("cuInit", 0)
        for attribute in (_MAJOR, _MINOR):
            _call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
            parts.append(str(value.value))
    except EngineError:
        return None
    return ".".join(parts)


def driver_version() -> str:
    """The newest CUDA version that the driver supports, for instance "13.0"."""
    number = ctypes.c_int()
    _call("cuDriverGetVersion", ctypes.byref(number))
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


class Stream:
    """A stream in the primary context of a device, the one that the runtime library uses.

    All but `handle` and `close` are called within ``with stream.current():``.
    """

    def __init__(self, device: int = 0) -> None:
        self.device = device
        self._context = ctypes.c_void_p()
        self._stream = ctypes.c_void_p()
        _call("cuInit", 0)
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        with self.current():
            _call("cuStreamCreate", ctypes.byref(self._stream), _NON_BLOCKING)

    @property
    def handle(self) -> int:
        """The address that libraries take as a cudaStream_t."""
        return self._stream.value or 0

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Makes the device the calling thread's, which may be one that never called CUDA."""
        _call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def synchronize(self) -> None:
        """Waits for all work on the stream."""
        _call("cuStreamSynchronize", self._stream)

    def copy(self, destination: int, source: int, size_bytes: int) -> None:
        """Starts a copy between two addresses of hosts or devices; the driver knows where they lie."""
        addresses = (ctypes.c_uint64(destination), ctypes.c_uint64(source))
        _call("cuMemcpyAsync", *addresses, ctypes.c_size_t(size_bytes), self._stream)

    def event(self) -> Event:
        """A new event."""
        event = Event()
        _call("cuEventCreate", ctypes.byref(event.pointer), 0)
        return event

    def record(self, event: Event) -> None:
        """Puts the event behind the work that the stream has now."""
        _call("cuEventRecord", event.pointer, self._stream)

    def close(self) -> None:
        """Destroys the stream and gives its context back."""
        if not self._stream:
            return
        with self.current():
            _call("cuStreamDestroy_v2", self._stream)
        self._stream = ctypes.c_void_p()
        _call("cuDevicePrimaryCtxRelease_v2", self.device)


class Event:
    """A point in a stream's work. It is destroyed with its context."""

    def __init__(self) -> None:
        self.pointer = ctypes.c_void_p()

    def milliseconds_since(self, start: Event) -> float:
        """Device time from `start` to here; both must have happened."""
        value = ctypes.c_float()
        _call("cuEventElapsedTime", ctypes.byref(value), start.pointer, self.pointer)
        return value.value
