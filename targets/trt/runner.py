"""Runs TensorRT engines in this process, or in a worker process where another interpreter has TensorRT."""

from __future__ import annotations

import contextlib
import importlib
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...compiler.signature import Signature
from ...errors import EngineError, EnginesmithError
from .._onnxruntime import to_numpy
from .._worker import KINDS, Worker
from ..base import Arrays, Bound
from ..cuda.dlpack import borrow, cuda_device, require_device
from ..cuda.stream import Stream
from . import build
from .binding import Binding
from .driver import Failure
from .layers import engine_layers
from .session import Session
from .worker import load_arrays, save_arrays

_LOADING_S = 600.0
_RUNNING_S = 600.0


def open_engine(
    module: str,
    plan: Path,
    signature: Signature,
    *,
    cuda_graph: bool,
    runtime_cache: Path | None = None,
    device: int = 0,
) -> SessionRunner | WorkerRunner:
    """Opens a plan on a GPU, by CUDA's number.

    Raises:
        EngineMismatchError: TensorRT refuses the plan.
        TargetUnavailableError: no driver or GPU.
    """
    cache = None if runtime_cache is None else str(runtime_cache)
    if build.in_process(module):
        with _translated():
            session = Session(importlib.import_module(module), str(plan), cuda_graph, cache, device)
        return SessionRunner(session, signature)
    return WorkerRunner(module, plan, signature, cuda_graph=cuda_graph, runtime_cache=cache, device=device)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turns a session's failure into the error of that kind."""
    try:
        yield
    except Failure as failure:
        raise KINDS.get(failure.kind, EngineError)(str(failure)) from failure


class SessionRunner:
    """An engine in this process."""

    def __init__(self, session: Session, signature: Signature) -> None:
        self._session = session
        self._signature = signature
        self._lock = threading.Lock()
        self._bindings: dict[int, Binding] = {}
        self._unused: list[int] = []  # keys of those whose bound was dropped; freed by the next `bind`

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs as arrays; where an input is a CUDA tensor and torch is loaded, as tensors of its current stream."""
        with self._lock, _translated():
            devices = {name: device for name, value in inputs.items() if (device := cuda_device(value)) is not None}
            for name, device in devices.items():
                require_device(name, device, self._session.driver.device.value)
            if devices:
                return self._run_on_gpu(inputs)
            return _typed(self._session.run(_host(inputs)), self._signature)

    def bind(self, inputs: Arrays) -> Bound:
        """Copies inputs to the GPU."""
        with self._active():
            while self._unused:
                dropped = self._bindings.pop(self._unused.pop(), None)
                if dropped is not None:
                    dropped.close()
            binding = Binding(self._session, inputs)
            self._bindings[id(binding)] = binding
            binding.put(inputs)
        bound = _SessionBound(self, binding)
        weakref.finalize(bound, self._unused.append, id(binding))
        return bound

    def profile(self, inputs: Arrays, iterations: int) -> tuple[list[dict[str, float]], list[Any]]:
        """Milliseconds of each layer in each run, and what TensorRT tells of the layers."""
        session = self._session
        with self._active(), contextlib.closing(Binding(session, inputs)) as binding:
            binding.put(inputs)
            return binding.profile(iterations), engine_layers(session.trt, session.engine)

    def reset(self) -> None:
        """Engines of TensorRT have no state."""

    def close(self) -> None:
        """Gives the GPU's memory back."""
        if self._bindings:
            with self._active():
                while self._bindings:
                    self._bindings.popitem()[1].close()
        with self._lock, _translated():
            self._session.close()

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        with self._lock, _translated(), self._session.active():
            yield

    def _run_on_gpu(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        session, torch = self._session, sys.modules.get("torch")
        place = f"cuda:{session.driver.device.value}"
        if torch is None:
            return _typed(session.run(_host(inputs)), self._signature)
        with session.active():
            binding = session.binding(inputs)
            if not binding.on_device or any(_dtype(inputs[name]) != session.dtypes[name] for name in session.inputs):
                arrays = _typed(session.run(_host(inputs)), self._signature)
                return {name: torch.as_tensor(array, device=place) for name, array in arrays.items()}
            borrowed = {
                name: borrow(name, value, session.dtypes[name], binding.stream)
                for name, value in inputs.items()
                if cuda_device(value) is not None
            }
            binding.put({name: to_numpy(name, value) for name, value in inputs.items() if name not in borrowed})
            outputs = {
                name: torch.empty(binding.shapes[name], dtype=getattr(torch, session.dtypes[name].name), device=place)
                for name in session.outputs
            }
            pointers = {name: tensor.address for name, tensor in borrowed.items()}
            pointers.update((name, tensor.data_ptr()) for name, tensor in outputs.items())
            binding.exchange(pointers, torch.cuda.current_stream(place).cuda_stream)
        return {spec.name: outputs[spec.name].to(getattr(torch, spec.dtype)) for spec in self._signature.outputs}


class _SessionBound:
    """`graph_refusal` says why runs are no replays of a CUDA graph, once they have been timed; empty where they are."""

    def __init__(self, runner: SessionRunner, binding: Binding) -> None:
        self._runner = runner
        self._binding = binding
        self.graph_refusal = ""

    def run(self) -> None:
        """Starts one execution."""
        with self._runner._active():
            self._binding.launch()

    def synchronize(self) -> None:
        """Waits for the GPU."""
        with self._runner._active():
            self._binding.synchronize()

    def timed(self, iterations: int) -> tuple[list[float], list[float] | None]:
        """Milliseconds on the host, synchronised, and of the GPU by events."""
        with self._runner._active():
            times = self._binding.timed(iterations)
        self.graph_refusal = self._binding.graph_refusal
        return times

    def outputs(self) -> dict[str, np.ndarray]:
        """The outputs of the last run."""
        with self._runner._active():
            return _typed(self._binding.fetch(), self._runner._signature)


class WorkerRunner:
    """An engine in a worker process; arrays travel as files of a scratch folder."""

    def __init__(
        self,
        module: str,
        plan: Path,
        signature: Signature,
        *,
        cuda_graph: bool,
        runtime_cache: str | None,
        device: int,
    ) -> None:
        self._signature = signature
        self._scratch = tempfile.TemporaryDirectory(prefix="enginesmith-", ignore_cleanup_errors=True)
        self._lock = threading.Lock()
        self._unused: list[int] = []
        self._worker = Worker(build.command(module), name=f"the {module} worker", failure=EngineError)
        weakref.finalize(self, self._worker.kill)
        try:
            self._call(
                "load",
                timeout_s=_LOADING_S,
                plan=str(plan.absolute()),
                scratch=self._scratch.name,
                cuda_graph=cuda_graph,
                runtime_cache=runtime_cache,
                device=device,
            )
        except EnginesmithError:
            self.close()
            raise

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs as arrays on the host."""
        with self._lock:
            files = save_arrays(self._scratch.name, "input", _host(inputs))
            return _typed(load_arrays(self._call("run", files=files)), self._signature)

    def bind(self, inputs: Arrays) -> Bound:
        """Copies inputs to the GPU."""
        with self._lock:
            files = save_arrays(self._scratch.name, "input", inputs)
            unused = [self._unused.pop() for _ in range(len(self._unused))]
            number = self._call("bind", files=files, release=unused)["binding"]
        bound = _WorkerBound(self, number)
        weakref.finalize(bound, self._unused.append, number)
        return bound

    def profile(self, inputs: Arrays, iterations: int) -> tuple[list[dict[str, float]], list[Any]]:
        """Milliseconds of each layer in each run, and what TensorRT tells of the layers."""
        with self._lock:
            files = save_arrays(self._scratch.name, "input", inputs)
            number = self._call("bind", files=files, release=[])["binding"]
            found = self._call("profile", binding=number, iterations=iterations)
            self._unused.append(number)
        return found["runs"], found["layers"]

    def reset(self) -> None:
        """Engines of TensorRT have no state."""

    def close(self) -> None:
        """Ends the worker."""
        self._worker.close()
        self._scratch.cleanup()

    def fetch(self, binding: int) -> dict[str, np.ndarray]:
        """Outputs of the last run of a binding."""
        with self._lock:
            return _typed(load_arrays(self._call("fetch", binding=binding)), self._signature)

    def _call(self, command: str, *, timeout_s: float = _RUNNING_S, **arguments: Any) -> dict[str, Any]:
        return self._worker.call(command, timeout_s=timeout_s, **arguments)


class _WorkerBound:
    def __init__(self, runner: WorkerRunner, number: int) -> None:
        self._runner = runner
        self._number = number
        self.graph_refusal = ""  # as above

    def run(self) -> None:
        """Runs once, until the GPU is done."""
        self._runner._call("launch", binding=self._number)

    def synchronize(self) -> None:
        """Nothing is left running."""

    def timed(self, iterations: int) -> tuple[list[float], list[float] | None]:
        """Milliseconds measured by the worker, on its host, synchronised, and of the GPU by events."""
        times = self._runner._call("timed", binding=self._number, iterations=iterations)
        self.graph_refusal = times["graph_refusal"]
        return times["host"], times["device"]

    def outputs(self) -> dict[str, np.ndarray]:
        """The outputs of the last run."""
        return self._runner.fetch(self._number)


def _dtype(value: Any) -> np.dtype[Any]:
    return np.dtype(str(value.dtype).removeprefix("torch."))


def _host(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays, and tensors copied from where they lie."""
    return {
        name: to_numpy(name, value) if cuda_device(value) is None else _fetched(name, value)
        for name, value in inputs.items()
    }


def _fetched(name: str, value: Any) -> np.ndarray:
    stream = Stream(cuda_device(value) or 0)
    with contextlib.closing(stream), stream.current():
        tensor = borrow(name, value, _dtype(value), stream.handle)
        array = np.empty(tensor.shape, tensor.dtype)
        stream.copy(array.ctypes.data, tensor.address, tensor.size_bytes)
        stream.synchronize()
    return array


def _typed(arrays: Mapping[str, np.ndarray], signature: Signature) -> dict[str, np.ndarray]:
    """The outputs in the model's order and dtypes; TensorRT before 10 gives 64-bit integers as 32-bit ones."""
    return {spec.name: arrays[spec.name].astype(spec.dtype, copy=False) for spec in signature.outputs}
