"""Streams and events of the CUDA driver, for timing and copying.

They are those of the runtime library too, so ONNX Runtime and TensorRT take them as their own.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from ...errors import EngineError
from .driver import call

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for work on the default stream


class Stream:
    """A stream in the primary context of a device, the one that the runtime library uses.

    All but `handle` and `close` are called within ``with stream.current():``.
    """

    def __init__(self, device: int = 0) -> None:
        self.device = device
        self._context = ctypes.c_void_p()
        self._stream = ctypes.c_void_p()
        call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        with self.current():
            call("cuStreamCreate", ctypes.byref(self._stream), _NON_BLOCKING)

    @property
    def handle(self) -> int:
        """The address that libraries take as a cudaStream_t."""
        return self._stream.value or 0

    @property
    def pointer(self) -> ctypes.c_void_p:
        """The same, for calls of the driver."""
        return self._stream

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Makes the device the calling thread's, which may be one that never called CUDA."""
        call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def synchronize(self) -> None:
        """Waits for all work on the stream."""
        call("cuStreamSynchronize", self._stream)

    def copy(self, destination: int, source: int, size_bytes: int) -> None:
        """Starts a copy between two addresses of hosts or devices; the driver knows where they lie."""
        addresses = (ctypes.c_uint64(destination), ctypes.c_uint64(source))
        call("cuMemcpyAsync", *addresses, ctypes.c_size_t(size_bytes), self._stream)

    def reach(self, other: Stream) -> None:
        """Lets copies between the two devices go directly, where the machine can; elsewhere they go by the host."""
        able = ctypes.c_int()
        call("cuDeviceCanAccessPeer", ctypes.byref(able), self.device, other.device)
        if able.value:
            with self.current(), contextlib.suppress(EngineError):  # an earlier engine has done it
                call("cuCtxEnablePeerAccess", other._context, 0)

    def send(self, other: Stream, destination: int, source: int, size_bytes: int) -> None:
        """Starts a copy, behind the work of this stream, to memory of another stream's device."""
        if other.device == self.device:
            self.copy(destination, source, size_bytes)
            return
        call(
            "cuMemcpyPeerAsync",
            ctypes.c_uint64(destination), other._context, ctypes.c_uint64(source), self._context,
            ctypes.c_size_t(size_bytes), self._stream,
        )  # fmt: skip

    def wait(self, event: Event) -> None:
        """Lets what comes later on this stream wait for an event, of another device too; the host does not."""
        call("cuStreamWaitEvent", self._stream, event.pointer, 0)

    def event(self) -> Event:
        """A new event."""
        event = Event()
        call("cuEventCreate", ctypes.byref(event.pointer), 0)
        return event

    def record(self, event: Event) -> None:
        """Puts the event behind the work that the stream has now."""
        call("cuEventRecord", event.pointer, self._stream)

    def close(self) -> None:
        """Destroys the stream and gives its context back."""
        if not self._stream:
            return
        with self.current():
            call("cuStreamDestroy_v2", self._stream)
        self._stream = ctypes.c_void_p()
        call("cuDevicePrimaryCtxRelease_v2", self.device)


class Event:
    """A point in a stream's work. It is destroyed with its context."""

    def __init__(self) -> None:
        self.pointer = ctypes.c_void_p()

    def synchronize(self) -> None:
        """Waits until it has happened."""
        call("cuEventSynchronize", self.pointer)

    def milliseconds_since(self, start: Event) -> float:
        """Device time from `start` to here; both must have happened."""
        value = ctypes.c_float()
        call("cuEventElapsedTime", ctypes.byref(value), start.pointer, self.pointer)
        return value.value
