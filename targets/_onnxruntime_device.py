"""Runs an ONNX Runtime session whose inputs and outputs lie on a CUDA device."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import DataError, EngineError
from ._cuda import Stream
from ._dlpack import Borrowed, borrow, cuda_device
from ._onnxruntime import failures, to_numpy
from .base import Arrays, Bound

DEVICE = "cuda"
MAX_GRAPHS = 16
"""Sets of input shapes that get a CUDA graph, with buffers of their own; further ones run without."""

Placed = Mapping[str, Borrowed | np.ndarray]
_NO_GRAPH = -1


class DeviceTensor:
    """An output on the device. ``torch.from_dlpack`` and the like take it as it is, `numpy` copies it to the host."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self.shape = tuple(value.shape())
        self.dtype = _dtype(value)

    def __dlpack__(self, *, stream: int | None = None, **unused: Any) -> Any:
        """A capsule over the same memory; the values are complete, so no stream has to wait."""
        return self._value._get_c_value().__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self._value._get_c_value().__dlpack_device__()
        return device

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.numpy(), dtype=dtype)

    def numpy(self) -> np.ndarray:
        """A copy on the host."""
        array: np.ndarray = self._value.numpy()
        return array


class DeviceRunner:
    """A session on a device. It has one stream, so that calls from several threads take turns.

    Args:
        session: an InferenceSession made with `stream` as its user_compute_stream.
        stream: closed together with the runner.
        outputs: names, in the order to give them.
        graphs: whether the session may capture CUDA graphs.
    """

    def __init__(self, session: Any, stream: Stream, outputs: Sequence[str], *, graphs: bool) -> None:
        self._session = session
        self._stream = stream
        self._inputs = [value.name for value in session.get_inputs()]
        self._outputs = list(outputs)
        self._buffers: dict[tuple[tuple[int, ...], ...], _Buffers] = {}
        self._graphs = graphs
        self._numbers = itertools.count(1) if graphs else itertools.repeat(_NO_GRAPH)
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name: NumPy arrays, or `DeviceTensor` where any input is a tensor on the device."""
        placed = {name: self._place(name, inputs[name]) for name in self._inputs}
        on_device = any(isinstance(value, Borrowed) for value in placed.values())
        with self._lock, self._running():
            buffers = self._buffers_for(placed) if self._graphs else None
            if buffers is not None:
                buffers.fill(placed)
                buffers.launch()
                return buffers.copies() if on_device else buffers.arrays()
            if on_device:
                return self._run_bound(placed)
            values = self._session.run(self._outputs, placed, _run_options(_NO_GRAPH))
            return dict(zip(self._outputs, values, strict=True))

    def bind(self, inputs: Arrays) -> Bound:
        """Copies the inputs to the device, into buffers of their own."""
        placed = {name: np.asarray(inputs[name], order="C") for name in self._inputs}
        with self._lock, self._running():
            return DeviceBound(self, self._new_buffers(placed))

    def reset(self) -> None:
        """A session keeps no state."""

    def close(self) -> None:
        """Waits for the running call, and gives the device's memory back."""
        with self._lock:
            self._buffers.clear()
            self._session = None
            self._stream.close()

    def _place(self, name: str, value: Any) -> Borrowed | np.ndarray:
        device = cuda_device(value)
        if device is None:
            return np.asarray(to_numpy(name, value), order="C")
        if device != self._stream.device:
            raise DataError(
                f"input {name!r} lies on another device", expected=f"cuda:{self._stream.device}", found=f"cuda:{device}"
            )
        return borrow(name, value, np.dtype(str(value.dtype).removeprefix("torch.")), self._stream.handle)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        with self._stream.current():
            try:
                yield
            except failures() as problem:
                raise EngineError(f"ONNX Runtime failed to run the engine: {problem}") from problem

    def _run_bound(self, placed: Placed) -> dict[str, Any]:
        binding = self._session.io_binding()
        for name, value in placed.items():
            if isinstance(value, Borrowed):
                binding.bind_input(name, DEVICE, self._stream.device, value.dtype, list(value.shape), value.address)
            else:
                binding.bind_cpu_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, DEVICE, self._stream.device)
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding, _run_options(_NO_GRAPH))
        self._stream.synchronize()
        return {name: DeviceTensor(v) for name, v in zip(self._outputs, binding.get_outputs(), strict=True)}

    def _buffers_for(self, placed: Placed) -> _Buffers | None:
        key = tuple(value.shape for value in placed.values())
        if key not in self._buffers and len(self._buffers) < MAX_GRAPHS:
            self._buffers[key] = self._new_buffers(placed)
        return self._buffers.get(key)

    def _new_buffers(self, placed: Placed) -> _Buffers:
        return _Buffers(self._session, self._stream, placed, self._outputs, next(self._numbers))


class _Buffers:
    """Inputs and outputs of one set of shapes at fixed places on the device, as a CUDA graph needs them."""

    def __init__(
        self,
        session: Any,
        stream: Stream,
        placed: Placed,
        outputs: Sequence[str],
        graph: int,
    ) -> None:
        import onnxruntime

        self._session = session
        self._stream = stream
        self._binding = session.io_binding()
        self._inputs = {
            name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                list(value.shape), value.dtype.type, DEVICE, stream.device
            )
            for name, value in placed.items()
        }
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name in outputs:
            self._binding.bind_output(name, DEVICE, stream.device)
        self.fill(placed)
        # The first run lets ONNX Runtime allocate the outputs, which stay where they are from then on.
        session.run_with_iobinding(self._binding, _run_options(_NO_GRAPH))
        stream.synchronize()
        self._outputs = dict(zip(outputs, self._binding.get_outputs(), strict=True))
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        # ONNX Runtime captures a graph for each number, which must never come back with other buffers.
        self._options = _run_options(graph, wait=False)

    def fill(self, placed: Placed) -> None:
        """Starts copying the inputs into the buffers."""
        for name, value in placed.items():
            target = self._inputs[name].data_ptr()
            if isinstance(value, Borrowed):
                self._stream.copy(target, value.address, value.size_bytes)
            else:
                self._stream.copy(target, value.ctypes.data, value.nbytes)

    def launch(self) -> None:
        """Starts one execution."""
        self._session.run_with_iobinding(self._binding, self._options)

    def arrays(self) -> dict[str, np.ndarray]:
        """The outputs on the host, once the runs before have finished."""
        result = {name: np.empty(value.shape(), _dtype(value)) for name, value in self._outputs.items()}
        for name, value in self._outputs.items():
            self._stream.copy(result[name].ctypes.data, value.data_ptr(), result[name].nbytes)
        self._stream.synchronize()
        return result

    def copies(self) -> dict[str, DeviceTensor]:
        """The outputs in new memory of the device, since the next run overwrites the buffers."""
        import onnxruntime

        result = {}
        for name, value in self._outputs.items():
            copy = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                list(value.shape()), value.element_type(), DEVICE, self._stream.device
            )
            self._stream.copy(copy.data_ptr(), value.data_ptr(), value.tensor_size_in_bytes())
            result[name] = DeviceTensor(copy)
        self._stream.synchronize()
        return result


class DeviceBound:
    """Inputs in buffers on the device, for repeated runs."""

    def __init__(self, runner: DeviceRunner, buffers: _Buffers) -> None:
        self._runner = runner
        self._buffers = buffers

    def run(self) -> None:
        """Starts one execution."""
        with self._runner._lock, self._runner._running():
            self._buffers.launch()

    def synchronize(self) -> None:
        """Waits for the device."""
        with self._runner._stream.current():
            self._runner._stream.synchronize()

    def timed(self, iterations: int) -> tuple[list[float], list[float] | None]:
        """Host and device milliseconds of each run, the device idle before each.

        Device time is that between two events on the stream, the gaps between kernels included.
        """
        host, device = [], []
        stream = self._runner._stream
        with self._runner._lock, self._runner._running():
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
        with self._runner._lock, self._runner._running():
            return self._buffers.arrays()


def _dtype(value: Any) -> np.dtype[Any]:
    """The dtype of an OrtValue, whose types are named as in ``tensor(float)``."""
    name: str = value.data_type().removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(name, name))


def _run_options(graph: int, *, wait: bool = True) -> Any:
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    options.add_run_config_entry("disable_synchronize_execution_providers", str(int(not wait)))
    return options
