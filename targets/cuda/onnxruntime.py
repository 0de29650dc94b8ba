"""Runs an ONNX Runtime session whose inputs and outputs lie on a CUDA device."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from ...errors import EngineError
from .._onnxruntime import failures, to_numpy
from ..base import Arrays, Bound
from .dlpack import Borrowed, DeviceTensor, borrow, cuda_device, ort_dtype, require_device
from .stream import Stream

DEVICE = "cuda"
MAX_GRAPHS = 16
"""Sets of input shapes that get a CUDA graph, with buffers of their own; further ones run without."""

Placed = Mapping[str, Borrowed | np.ndarray]
NO_GRAPH = -1
"""The number that tells ONNX Runtime to capture no CUDA graph."""

T = TypeVar("T")


class DeviceRunner:
    """A session on a device. It has one stream, so that calls from several threads take turns.

    ONNX Runtime captures CUDA graphs anew for every thread that calls it, so such a session has a thread of its own.

    Args:
        session: an InferenceSession made with `stream` as its user_compute_stream.
        stream: closed together with the runner.
        outputs: names, in the order to give them.
        graphs: whether the session may capture CUDA graphs.
        states: outputs that `bind` writes in the place of an input, by the input.
    """

    def __init__(
        self,
        session: Any,
        stream: Stream,
        outputs: Sequence[str],
        *,
        graphs: bool,
        states: Mapping[str, str] | None = None,
    ) -> None:
        self.stream = stream
        self._session = session
        self._inputs = [value.name for value in session.get_inputs()]
        self._outputs = list(outputs)
        self._buffers: dict[tuple[tuple[int, ...], ...], Buffers] = {}
        self._states = dict(states or {})
        self._graphs = graphs
        self._numbers = itertools.count(1) if graphs else itertools.repeat(NO_GRAPH)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cuda-graph") if graphs else None
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name: NumPy arrays, or `DeviceTensor` where any input is a tensor on the device."""
        placed = {name: self._place(name, inputs[name]) for name in self._inputs}
        return self.turn(lambda: self._run(placed))

    def bind(self, inputs: Arrays) -> Bound:
        """Copies the inputs to the device, into buffers of their own."""
        return DeviceBound(self, self._bound(inputs))

    def buffers(self, placed: Placed) -> Buffers:
        """Buffers of their own for inputs of these shapes, filled with them. Called within `turn`."""
        return self._new_buffers(placed)

    def reset(self) -> None:
        """A session keeps no state."""

    def close(self) -> None:
        """Waits for the running call and the device, and gives the device's memory back."""
        if self._thread is not None:
            self._thread.shutdown()
        with self._lock:
            if self._session is not None:
                with contextlib.suppress(EngineError):  # of a GPU that has failed
                    self._on_device(self.stream.synchronize)  # what runs there may let go of the session's memory
            self._buffers.clear()
            self._session = None
            self.stream.close()

    def turn(self, call: Callable[[], T]) -> T:
        """Makes a call when those before it are done, in the thread and on the device of the session.

        Raises:
            EngineError: ONNX Runtime or the driver failed, or the runner is closed.
        """
        if self._thread is None:
            return self._turn(call)
        try:
            future = self._thread.submit(self._turn, call)
        except RuntimeError as error:
            raise _closed() from error
        return future.result()

    def _turn(self, call: Callable[[], T]) -> T:
        with self._lock:
            if self._session is None:
                raise _closed()
            return self._on_device(call)

    def _on_device(self, call: Callable[[], T]) -> T:
        with self.stream.current():
            try:
                return call()
            except failures() as problem:
                raise EngineError(f"ONNX Runtime failed to run the engine: {problem}") from problem

    def _bound(self, inputs: Arrays) -> Buffers:
        placed = {name: np.asarray(inputs[name], order="C") for name in self._inputs}
        return self.turn(lambda: self._new_buffers(placed))

    def _place(self, name: str, value: Any) -> Borrowed | np.ndarray:
        device = cuda_device(value)
        if device is None:
            return np.asarray(to_numpy(name, value), order="C")
        require_device(name, device, self.stream.device)
        return borrow(name, value, np.dtype(str(value.dtype).removeprefix("torch.")), self.stream.handle)

    def _run(self, placed: Placed) -> dict[str, Any]:
        on_device = any(isinstance(value, Borrowed) for value in placed.values())
        buffers = self._buffers_for(placed) if self._graphs else None
        if buffers is not None:
            buffers.fill(placed)
            buffers.launch()
            return buffers.copies() if on_device else buffers.arrays()
        if on_device:
            return self._run_bound(placed)
        values = self._session.run(self._outputs, placed, run_options(NO_GRAPH))
        return dict(zip(self._outputs, values, strict=True))

    def _run_bound(self, placed: Placed) -> dict[str, DeviceTensor]:
        binding = self._session.io_binding()
        for name, value in placed.items():
            if isinstance(value, Borrowed):
                binding.bind_input(name, DEVICE, self.stream.device, value.dtype, list(value.shape), value.address)
            else:
                binding.bind_cpu_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, DEVICE, self.stream.device)
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding, run_options(NO_GRAPH))
        values = binding.get_outputs()
        if self._graphs:
            # The session's memory is also that of captured graphs, whose next replay may overwrite these outputs.
            values = [_copy(value, self.stream) for value in values]
        self.stream.synchronize()
        return {name: DeviceTensor(value) for name, value in zip(self._outputs, values, strict=True)}

    def _buffers_for(self, placed: Placed) -> Buffers | None:
        key = tuple(value.shape for value in placed.values())
        if key not in self._buffers and len(self._buffers) < MAX_GRAPHS:
            self._buffers[key] = self._new_buffers(placed)
        return self._buffers.get(key)

    def _new_buffers(self, placed: Placed) -> Buffers:
        return Buffers(self._session, self.stream, placed, self._outputs, next(self._numbers), self._states)


class Buffers:
    """Inputs and outputs of one set of shapes at fixed places on the device, as a CUDA graph needs them.

    They lie outside of the session's own memory, which captured graphs share and overwrite. An output of `states` lies
    where its input does.
    """

    def __init__(
        self,
        session: Any,
        stream: Stream,
        placed: Placed,
        outputs: Sequence[str],
        graph: int,
        states: Mapping[str, str],
    ) -> None:
        self._session = session
        self._stream = stream
        self._binding = session.io_binding()
        self._inputs = {name: empty(value.shape, value.dtype.type, stream) for name, value in placed.items()}
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        self._outputs = {output: self._inputs[name] for name, output in states.items()}
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        others = [name for name in outputs if name not in self._outputs]
        for name in others:
            self._binding.bind_output(name, DEVICE, stream.device)
        self.fill(placed)
        session.run_with_iobinding(self._binding, run_options(NO_GRAPH))  # tells the shapes of the outputs
        found = dict(zip([*self._outputs, *others], self._binding.get_outputs(), strict=True))
        self._outputs |= {name: _copy(found[name], stream) for name in others}
        stream.synchronize()
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        # ONNX Runtime captures a graph for each number, which must never come back with other buffers.
        self._options = run_options(graph, wait=False)

    def fill(self, placed: Placed) -> None:
        """Starts copying the inputs into the buffers."""
        for name, value in placed.items():
            target = self._inputs[name].data_ptr()
            if isinstance(value, Borrowed):
                self._stream.copy(target, value.address, value.size_bytes)
            else:
                self._stream.copy(target, value.ctypes.data, value.nbytes)

    def place(self, name: str) -> Borrowed:
        """Where an input or output lies."""
        value = self._inputs[name] if name in self._inputs else self._outputs[name]
        return Borrowed(value.data_ptr(), tuple(value.shape()), ort_dtype(value), value)

    def launch(self) -> None:
        """Starts one execution."""
        self._session.run_with_iobinding(self._binding, self._options)

    def arrays(self) -> dict[str, np.ndarray]:
        """The outputs on the host, once the runs before have finished."""
        result = {name: np.empty(value.shape(), ort_dtype(value)) for name, value in self._outputs.items()}
        for name, value in self._outputs.items():
            self._stream.copy(result[name].ctypes.data, value.data_ptr(), result[name].nbytes)
        self._stream.synchronize()
        return result

    def copies(self) -> dict[str, DeviceTensor]:
        """The outputs in new memory of the device, since the next run overwrites the buffers."""
        result = {name: DeviceTensor(_copy(value, self._stream)) for name, value in self._outputs.items()}
        self._stream.synchronize()
        return result


class DeviceBound:
    """Inputs in buffers on the device, for repeated runs."""

    def __init__(self, runner: DeviceRunner, buffers: Buffers) -> None:
        self._runner = runner
        self._buffers = buffers

    def run(self) -> None:
        """Starts one execution."""
        self._runner.turn(self._buffers.launch)

    def synchronize(self) -> None:
        """Waits for the device."""
        self._runner.turn(self._runner.stream.synchronize)

    def timed(self, iterations: int) -> tuple[list[float], list[float] | None]:
        """Host and device milliseconds of each run, the device idle before each.

        Device time is that between two events on the stream, the gaps between kernels included.
        """
        return self._runner.turn(lambda: self._timed(iterations))

    def _timed(self, iterations: int) -> tuple[list[float], list[float]]:
        host, device = [], []
        stream = self._runner.stream
        start, end = stream.event(), stream.event()
        stream.synchronize()
        for _ in range(iterations):
            begin = time.perf_counter_ns()
            stream.record(start)
            self._buffers.launch()
            stream.record(end)
            stream.synchronize()
            host.append((time.perf_counter_ns() - begin) / 1e6)
            device.append(end.milliseconds_since(start))
        return host, device

    def outputs(self) -> dict[str, np.ndarray]:
        """The outputs of the last run, on the host."""
        return self._runner.turn(self._buffers.arrays)


def _closed() -> EngineError:
    return EngineError("the engine is closed", hint="load it again")


def empty(shape: Sequence[int], element_type: Any, stream: Stream) -> Any:
    """New memory of the device, as an OrtValue."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), element_type, DEVICE, stream.device)


def _copy(value: Any, stream: Stream) -> Any:
    """Starts copying an OrtValue into new memory of the device."""
    copy = empty(value.shape(), value.element_type(), stream)
    stream.copy(copy.data_ptr(), value.data_ptr(), value.tensor_size_in_bytes())
    return copy


def run_options(graph: int, *, wait: bool = True) -> Any:
    """Those of a run that captures or replays the CUDA graph of a number, and whether it waits for the device."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    options.add_run_config_entry("disable_synchronize_execution_providers", str(int(not wait)))
    return options
