"""Runs TensorRT engines on the GPU through the CUDA driver's library.

Imported by deployed programs and, under another interpreter perhaps, by the worker: it needs NumPy and TensorRT or
TensorRT-RTX only,.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .binding import Binding
from .callbacks import make_logger
from .driver import Driver, Failure

DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "INT64": "int64", "BOOL": "bool",
    "UINT8": "uint8",
}  # fmt: skip
"""Types of inputs and outputs that NumPy can hold, by TensorRT's names."""

BINDINGS = 4
"""Combinations of shapes that keep buffers, a context and a CUDA graph each."""


class Session:
    """An engine on a GPU. Calls must not overlap.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        plan: file of the engine.
        cuda_graph: whether to replay launches as CUDA graphs.
        runtime_cache: file where TensorRT-RTX keeps the kernels that it compiles on first use; None for none.
        device: which GPU, by CUDA's number.

    Raises:
        Failure: "unavailable" without driver or GPU, "mismatch" where the plan is not for this GPU and version.
    """

    def __init__(
        self, trt: Any, plan: str, cuda_graph: bool = True, runtime_cache: str | None = None, device: int = 0
    ) -> None:
        self.trt = trt
        self.cuda_graph = cuda_graph
        self.driver = Driver(device)
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


def write_atomically(path: str, content: Any) -> None:
    """Writes beside the file and renames."""
    with open(f"{path}.{os.getpid()}", "wb") as file:
        file.write(content)
    os.replace(file.name, path)
