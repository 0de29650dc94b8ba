"""Executes a TensorRT engine at fixed shapes: context, buffers, stream, CUDA graph.

Needs NumPy only beside the session,.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .callbacks import make_allocator, make_profiler
from .driver import Failure, allocate, u64

if TYPE_CHECKING:
    from .session import Session


class Binding:
    """A context with buffers for inputs of fixed shapes. The GPU's context must be active in every call."""

    def __init__(self, session: Session, inputs: Mapping[str, Any]) -> None:
        self._session = session
        self._driver = session.driver
        self._stream = ctypes.c_void_p()
        self._driver("cuStreamCreate", ctypes.byref(self._stream), 1)  # CU_STREAM_NON_BLOCKING
        self._events = (ctypes.c_void_p(), ctypes.c_void_p())
        for event in self._events:
            self._driver("cuEventCreate", ctypes.byref(event), 0)
        self._graph: ctypes.c_void_p | None = None
        self._launched = False
        self.graph_refusal = "" if session.cuda_graph else "switched off"
        self._host: dict[str, np.ndarray] = {}  # outputs that TensorRT computes on the host: shapes
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._buffers: dict[str, u64] = {}
        self._allocator = make_allocator(session.trt, self._driver)
        self._context: Any = None
        try:
            self._prepare({name: tuple(inputs[name].shape) for name in session.inputs})
        except Failure:
            self.close()
            raise

    def put(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Copies inputs to the device; returns once they may be changed."""
        for name, buffer in self._buffers.items():
            if name in inputs:
                array = convert(name, inputs[name], self._session.dtypes[name])
                self._driver(
                    "cuMemcpyHtoDAsync_v2", buffer, ctypes.c_void_p(array.ctypes.data), u64(array.nbytes), self._stream
                )
                self.synchronize()  # `array` may be a temporary

    def launch(self) -> None:
        """Starts one execution. The second one is captured as a CUDA graph, and it and later ones are replays."""
        if self._launched and self._graph is None and not self.graph_refusal:
            self._capture()
        self._launched = True
        if self._graph is not None:
            self._driver("cuGraphLaunch", self._graph, self._stream)
        elif not self._context.execute_async_v3(self.stream):
            raise self._session.fail("the engine could not be executed")

    def synchronize(self) -> None:
        """Waits for the device."""
        self._driver("cuStreamSynchronize", self._stream)

    def fetch(self) -> dict[str, np.ndarray]:
        """The outputs of the last execution, on the host."""
        arrays = {}
        for name in self._session.outputs:
            if name in self._host:
                self.synchronize()
                arrays[name] = self._host[name].copy()
                continue
            if name not in self._buffers:
                self.synchronize()
                self.shapes[name] = self._allocator.shapes[name]
            array = arrays[name] = np.empty(self.shapes[name], self._session.dtypes[name])
            buffer = self._buffers[name] if name in self._buffers else self._allocator.memory[name]
            self._driver(
                "cuMemcpyDtoHAsync_v2", ctypes.c_void_p(array.ctypes.data), buffer, u64(array.nbytes), self._stream
            )
        self.synchronize()
        return arrays

    def exchange(self, pointers: Mapping[str, int], stream: int) -> None:
        """Executes on device memory of the caller, ordered after what `stream` holds and before what it gets next.

        Without a CUDA graph the engine reads and writes that memory itself; with one, whose addresses are fixed, data
        is copied on the device. Inputs without a pointer are those that were `put`.
        """
        mine, theirs = self._stream, ctypes.c_void_p(stream)
        self._wait(mine, theirs)
        if self.graph_refusal:
            for name, pointer in pointers.items():
                self._context.set_tensor_address(name, pointer)
            self.launch()
            for name in pointers:
                self._context.set_tensor_address(name, self._buffers[name].value)
        else:
            for name in set(self._session.inputs) & set(pointers):
                self._driver("cuMemcpyDtoDAsync_v2", self._buffers[name], u64(pointers[name]), self._bytes(name), mine)
            self.launch()
            for name in self._session.outputs:
                self._driver("cuMemcpyDtoDAsync_v2", u64(pointers[name]), self._buffers[name], self._bytes(name), mine)
        self._wait(theirs, mine)

    @property
    def stream(self) -> int:
        """The stream, as libraries take it."""
        return self._stream.value or 0

    @property
    def on_device(self) -> bool:
        """Whether every input and output has fixed memory on the device, as `exchange` needs."""
        return not self._host and all(name in self._buffers for name in self._session.outputs)

    def timed(self, iterations: int) -> tuple[list[float], list[float]]:
        """Milliseconds of executions one after the other, of the host until the device is done, and of the device."""
        host, device, elapsed = [], [], ctypes.c_float()
        before, after = self._events
        while self._graph is None and not self.graph_refusal:  # the capture is not to be timed
            self.launch()
        for _ in range(iterations):
            start = time.perf_counter_ns()
            self._driver("cuEventRecord", before, self._stream)
            self.launch()
            self._driver("cuEventRecord", after, self._stream)
            self.synchronize()
            host.append((time.perf_counter_ns() - start) / 1e6)
            self._driver("cuEventElapsedTime", ctypes.byref(elapsed), before, after)
            device.append(elapsed.value)
        return host, device

    def profile(self, iterations: int) -> list[dict[str, float]]:
        """Milliseconds of each layer in each execution; with a profiler TensorRT runs without a CUDA graph."""
        profiler, runs = make_profiler(self._session.trt), []
        self._context.profiler = profiler
        for _ in range(iterations + 1):
            profiler.times = {}
            if not self._context.execute_async_v3(self.stream):
                raise self._session.fail("the engine could not be executed under the profiler")
            self.synchronize()
            runs.append(profiler.times)
        return runs[1:]  # the first call allocates and loads kernels

    def close(self) -> None:
        """Frees memory, stream and graph."""
        self.synchronize()
        self._context = None
        if self._graph is not None:
            self._driver("cuGraphExecDestroy", self._graph)
        for buffer in (*self._buffers.values(), *self._allocator.memory.values()):
            self._driver("cuMemFree_v2", buffer)
        for event in self._events:
            self._driver("cuEventDestroy_v2", event)
        self._driver("cuStreamDestroy_v2", self._stream)

    def _prepare(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._context = self._session.context()
        self._choose_profile(shapes)
        for name, shape in shapes.items():
            self._set_input(name, shape)
        missing = self._context.infer_shapes()
        if missing:
            raise self._session.fail(f"shapes of {', '.join(missing)} cannot be inferred")
        for name in self._session.outputs:
            self._set_output(name)

    def _choose_profile(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Switches to the narrowest profile that holds the shapes; a new context may have none at all."""
        index = 0
        if self._session.engine.num_optimization_profiles > 1:
            index = self._narrowest(shapes)
        if index == self._context.active_optimization_profile:
            return
        if not self._context.set_optimization_profile_async(index, self.stream):
            raise self._session.fail(f"optimization profile {index} cannot be used")
        self.synchronize()

    def _narrowest(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        engine, fitting = self._session.engine, []
        dynamic = [n for n in shapes if -1 in tuple(engine.get_tensor_shape(n))]
        for index in range(engine.num_optimization_profiles):
            width, fits = 0, True
            for name in dynamic:
                low, _, high = (tuple(bound) for bound in engine.get_tensor_profile_shape(name, index))
                fits = fits and all(low[i] <= size <= high[i] for i, size in enumerate(shapes[name]))
                width += math.prod(high) - math.prod(low)
            if fits:
                fitting.append((width, index))
        if not fitting:
            raise Failure("data", f"no optimization profile of the engine holds the shapes {dict(shapes)}")
        return min(fitting)[1]

    def _set_input(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(name, shape):
            raise Failure("data", f"the engine refuses shape {shape} of {name!r}")
        self.shapes[name] = shape
        self._allocate(name)

    def _set_output(self, name: str) -> None:
        self.shapes[name] = tuple(self._context.get_tensor_shape(name))
        if min(self.shapes[name], default=0) < 0:
            self.graph_refusal = f"the shape of output {name!r} depends on values"
            self._context.set_output_allocator(name, self._allocator)
        elif self._session.engine.get_tensor_location(name) == self._session.trt.TensorLocation.HOST:
            self._host[name] = np.zeros(self.shapes[name], self._session.dtypes[name])
            self._context.set_tensor_address(name, self._host[name].ctypes.data)
        else:
            self._allocate(name)

    def _allocate(self, name: str) -> None:
        self._buffers[name] = allocate(self._driver, self._bytes(name).value)
        self._context.set_tensor_address(name, self._buffers[name].value)

    def _bytes(self, name: str) -> u64:
        return u64(math.prod(self.shapes[name]) * self._session.dtypes[name].itemsize)

    def _wait(self, waiting: ctypes.c_void_p, first: ctypes.c_void_p) -> None:
        self._driver("cuEventRecord", self._events[0], first)
        self._driver("cuStreamWaitEvent", waiting, self._events[0], 0)

    def _capture(self) -> None:
        """Records an execution as a CUDA graph, or the reason why it cannot be one."""
        self.synchronize()
        if not getattr(self._context, "is_stream_capturable", lambda stream: True)(self.stream):
            self.graph_refusal = "TensorRT says that this engine cannot be captured"
            return
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._driver("cuStreamBeginCapture_v2", self._stream, 1)  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        enqueued = self._context.execute_async_v3(self.stream)
        try:
            self._driver("cuStreamEndCapture", self._stream, ctypes.byref(graph))
            if not enqueued:
                raise self._session.fail("TensorRT refused to enqueue while capturing")
            self._driver("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, u64(0))
            self._graph = executable
        except Failure as failure:
            self.graph_refusal = str(failure)
        if graph:
            self._driver("cuGraphDestroy", graph)


def convert(name: str, value: Any, dtype: np.dtype[Any]) -> np.ndarray:
    """An array as the engine takes it; TensorRT before 10 turns 64-bit integers to 32 bits.

    Raises:
        Failure: an integer that does not fit.
    """
    array = np.asarray(value, order="C")
    if array.dtype == dtype:
        return array
    if dtype.kind in "iu" and array.dtype.kind in "iu" and array.size:
        limits = np.iinfo(dtype)
        if array.min() < limits.min or array.max() > limits.max:
            raise Failure("data", f"input {name!r} holds integers that do not fit {dtype}, the engine's type")
    return np.asarray(array.astype(dtype), order="C")
