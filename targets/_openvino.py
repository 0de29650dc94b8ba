"""Runs a model that OpenVINO compiled."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import DataError, EngineError, EnginesmithError
from ._onnxruntime import to_numpy
from ._signal_stack import kept_signal_stack
from .base import Arrays, Bound, HostBound

_WIDE = (np.int64, np.uint32, np.uint64)


class OpenVINORunner:
    """A compiled model: arrays in, arrays out. Each call in flight has a request of its own."""

    def __init__(self, compiled: Any, outputs: Sequence[str]) -> None:
        self._compiled = compiled
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._inputs = [value.get_any_name() for value in compiled.inputs]
        self._outputs = list(outputs)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Outputs by name, as arrays of their own; DLPack tensors of the CPU are read in place."""
        feed = {name: _narrow(name, to_numpy(name, inputs[name])) for name in self._inputs}
        with self._request() as request, translated("OpenVINO failed to run the engine", EngineError):
            request.infer(feed, share_inputs=True)
            return self._taken(request)

    def bind(self, inputs: Arrays) -> Bound:
        """A request of its own that holds the inputs."""
        import openvino

        request = self._compiled.create_infer_request()
        with translated("OpenVINO refused the inputs", EngineError):
            for name in self._inputs:
                array = np.array(_narrow(name, inputs[name]), order="C")
                request.set_tensor(name, openvino.Tensor(array, shared_memory=False))
        return _Bound(request, self._taken)

    def reset(self) -> None:
        """A compiled model keeps no state."""

    def close(self) -> None:
        """Lets go of the model and its requests."""
        with kept_signal_stack():
            self._compiled = None
            self._idle = queue.SimpleQueue()

    @contextlib.contextmanager
    def _request(self) -> Iterator[Any]:
        try:
            request = self._idle.get_nowait()
        except queue.Empty:
            request = self._compiled.create_infer_request()
        try:
            yield request
        finally:
            self._idle.put(request)

    def _taken(self, request: Any) -> dict[str, np.ndarray]:
        values = request.results
        return {name: np.array(value) for name, value in zip(self._outputs, values.values(), strict=True)}


class _Bound(HostBound):
    """Runs one request; its outputs are copied when somebody asks."""

    def __init__(self, request: Any, taken: Any) -> None:
        super().__init__(dict)
        self._request = request
        self._taken = taken

    def run(self) -> None:
        """Runs once."""
        with translated("OpenVINO failed to run the engine", EngineError):
            self._request.infer()

    def outputs(self) -> dict[str, np.ndarray]:
        """The outputs of the last run."""
        found: dict[str, np.ndarray] = self._taken(self._request)
        return found


def _narrow(name: str, array: np.ndarray) -> np.ndarray:
    """The array, whose integers must fit into the 32 bits that OpenVINO computes them in; it would cut others off.

    Raises:
        DataError: one does not.
    """
    if array.dtype in _WIDE and array.size:
        low, high, limits = array.min(), array.max(), np.iinfo(np.int32)
        if low < limits.min or high > limits.max:
            raise DataError(
                f"input {name!r} holds integers that OpenVINO cuts off",
                expected=f"{limits.min} to {limits.max}, as it computes {array.dtype} in int32",
                found=f"{low} to {high}",
                hint="run an engine of another target",
            )
    return array


@contextlib.contextmanager
def translated(what: str, error: type[EnginesmithError]) -> Iterator[None]:
    """OpenVINO raises RuntimeError, and ValueError or TypeError for inputs that do not fit."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as problem:
        raise error(f"{what}: {str(problem).strip()}") from problem
