"""Runs TensorRT engines on the GPU through the CUDA driver's library.

Imported by deployed programs and, under another interpreter perhaps, by the worker: it needs NumPy and TensorRT or
TensorRT-RTX only, and must keep working on Python 3.8.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

if __package__:
    from .cuda_driver import Driver, Failure, allocate, u64
    from .tensorrt_callbacks import make_allocator, make_logger
else:  # imported by the worker, which runs as a script
    from cuda_driver import Driver, Failure, allocate, u64  # type: ignore[import-not-found, no-redef]
    from tensorrt_callbacks import make_allocator, make_logger  # type: ignore[import-not-found, no-redef]

DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "INT64": "int64", "BOOL": "bool",
    "UINT8": "uint8",
}  # fmt: skip
"""Types of inputs and outputs that NumPy can hold, by TensorRT's names."""

BINDINGS = 4
"""Combinations of shapes that keep buffers, a context and a CUDA graph each."""


class Session:
    """An engine on the first GPU. Calls must not overlap.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        plan: file of the engine.
        cuda_graph: whether to replay launches as CUDA graphs.
        runtime_cache: file where TensorRT-RTX keeps the kernels that it compiles on first use; None for none.

    Raises:
        Failure: "unavailable" without driver or GPU, "mismatch" where the plan is not for this GPU and version.
    """

    def __init__(self, trt: Any, plan: str, cuda_graph: bool = True, runtime_cache: str | None = None) -> None:
        self.trt = trt
        self.cuda_graph = cuda_graph
        self.driver = Driver()
        self._primary = ctypes.c_void_p()
        self.driver("cuDevicePrimaryCtxRetain", ctypes.byref(self._primary), self.driver.device)
        self._logger = make_logger(trt)
        self._bindings: dict[Any, Binding] = {}
        self._runtime: Any = None
        self._runtime_config: Any = None
        self._runtime_cache: tuple[Any, str] | None = None
        self.engine: Any = None
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.dtypes: dict[str, np.dtype[Any]] = {}
        try:
            self._open(plan, runtime_cache)
        except Failure:
            self.engine = self._runtime = None
            self.driver("cuDevicePrimaryCtxRelease_v2", self.driver.device)
            raise

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Makes the GPU's primary context current in this thread, and what was current before again afterwards."""
        self.driver("cuCtxPushCurrent_v2", self._primary)
        try:
            yield
        finally:
            self.driver("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of host arrays, on the host."""
        with self.active():
            binding = self.binding(inputs)
            binding.put(inputs)
            binding.launch()
            return binding.fetch()

    def binding(self, inputs: Mapping[str, Any]) -> Binding:
        """Buffers for inputs of these shapes, kept for the next call; the GPU's context must be active."""
        key = tuple(tuple(inputs[name].shape) for name in self.inputs)
        found = self._bindings.pop(key, None) or Binding(self, inputs)
        self._bindings[key] = found  # the one used last stands last
        if len(self._bindings) > BINDINGS:
            self._bindings.pop(next(iter(self._bindings))).close()
        return found

    def context(self) -> Any:
        """A new execution context."""
        if self.engine is None:
            raise Failure("failed", "the engine is closed")
        arguments = () if self._runtime_config is None else (self._runtime_config,)
        context = self.engine.create_execution_context(*arguments)
        if context is None:
            raise self.fail("TensorRT made no execution context")
        return context

    def fail(self, what: str) -> Failure:
        """A failure with TensorRT's last errors."""
        return Failure("failed", f"{what}: {self.errors()}")

    def errors(self) -> str:
        """The last errors that TensorRT told."""
        return "; ".join(self._logger.errors) or "TensorRT gave no reason"

    def close(self) -> None:
        """Gives the GPU's memory back, and saves the runtime cache; once closed it stays so."""
        if self.engine is None:
            return
        with self.active():
            for binding in self._bindings.values():
                binding.close()
            self._bindings.clear()
            if self._runtime_cache is not None:
                with contextlib.suppress(OSError):  # the next session compiles its kernels again
                    write_atomically(self._runtime_cache[1], self._runtime_cache[0].serialize())
            self._runtime_config = self._runtime_cache = None
            self.engine = None
            self._runtime = None
        self.driver("cuDevicePrimaryCtxRelease_v2", self.driver.device)

    def _open(self, plan: str, runtime_cache: str | None) -> None:
        trt = self.trt
        with self.active():
            self._runtime = trt.Runtime(self._logger)
            with open(plan, "rb") as file:
                self.engine = self._runtime.deserialize_cuda_engine(file.read())
            if self.engine is None:
                raise Failure("mismatch", f"{trt.__name__} {trt.__version__} cannot open the engine: {self.errors()}")
            if runtime_cache is not None:
                self._use_runtime_cache(runtime_cache)
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.inputs = [n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.outputs = [n for n in names if n not in self.inputs]
        self.dtypes = {name: self._dtype(name) for name in names}

    def _use_runtime_cache(self, path: str) -> None:
        config = self.engine.create_runtime_config()
        cache = config.create_runtime_cache()
        if os.path.exists(path):
            with open(path, "rb") as file:
                cache.deserialize(file.read())
        config.set_runtime_cache(cache)
        self._runtime_config, self._runtime_cache = config, (cache, path)

    def _dtype(self, name: str) -> np.dtype[Any]:
        kind = self.engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise Failure("failed", f"{name!r} of the engine is {kind}, which NumPy cannot hold")
        return np.dtype(DTYPES[kind])


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


def write_atomically(path: str, content: Any) -> None:
    """Writes beside the file and renames."""
    with open(f"{path}.{os.getpid()}", "wb") as file:
        file.write(content)
    os.replace(file.name, path)
