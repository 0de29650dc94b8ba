"""Arrays as messages of the protocol (KServe v2 by gRPC), and channels to one server or several."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..compiler.signature import check_names
from ..errors import DataError, EngineError, TargetUnavailableError, UsageError
from .endpoint import CHANNEL_OPTIONS, CLIENT
from .layout import TYPES

DTYPES = {triton: name for name, triton in TYPES.items()}
"""NumPy's name of a dtype by Triton's. bfloat16, which NumPy lacks, is read as float32."""


@dataclasses.dataclass(frozen=True)
class Access:
    """How servers are reached.

    Attributes:
        urls: ``host:port`` of each; several have to be addresses, among which calls go round.
        root: PEM file of the roots that the servers' certificates must come from; TLS is used where it is given.
        cert: PEM file of the client's own certificate, where the servers ask for one.
        key: PEM file of its private key.
    """

    urls: tuple[str, ...]
    root: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if not self.urls or any(not _is_address(url) for url in self.urls):
            raise UsageError("a server's address cannot be read", expected="host:port", found=", ".join(self.urls))
        if (self.cert is None) != (self.key is None) or (self.cert and not self.root):
            raise UsageError("a client's certificate needs its key, and the roots that the server's comes from")

    @property
    def target(self) -> str:
        """The name that gRPC resolves."""
        if len(self.urls) == 1:
            return self.urls[0]
        family = "ipv6" if all(url.startswith("[") for url in self.urls) else "ipv4"
        return f"{family}:{','.join(url.replace('localhost', '127.0.0.1') for url in self.urls)}"

    def channel(self, *, asynchronous: bool = False) -> Any:
        """A channel that uses all servers in turn and leaves out those that do not answer.

        Raises:
            TargetUnavailableError: gRPC is missing.
            UsageError: a file of the TLS options cannot be read.
        """
        grpc = _grpc()
        module = grpc.aio if asynchronous else grpc
        if self.root is None:
            return module.insecure_channel(self.target, options=_OPTIONS)
        root, cert, key = (_read(path) for path in (self.root, self.cert, self.key))
        return module.secure_channel(self.target, grpc.ssl_channel_credentials(root, key, cert), options=_OPTIONS)


_OPTIONS = [*CHANNEL_OPTIONS, ("grpc.lb_policy_name", "round_robin"), ("grpc.max_reconnect_backoff_ms", 1000)]


def stub(channel: Any) -> Any:
    """The calls of the protocol on a channel."""
    _grpc()
    from tritonclient.grpc import service_pb2_grpc

    return service_pb2_grpc.GRPCInferenceServiceStub(channel)


@dataclasses.dataclass(frozen=True)
class RemoteTensor:
    """An input or output as a server describes it; -1 is any size. The first axis is that of rows where it merges."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """NumPy's name."""
        return DTYPES[self.datatype]

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join('?' if size < 0 else str(size) for size in self.shape)}:{self.dtype}"

    def check(self, array: np.ndarray) -> None:
        """Raises DataError where an array does not fit."""
        if array.dtype.name != self.dtype:
            raise DataError(f"input {self.name!r} has the wrong dtype", expected=self.dtype, found=array.dtype.name)
        fits = len(array.shape) == len(self.shape) and all(
            size in (found, -1) for size, found in zip(self.shape, array.shape, strict=True)
        )
        if not fits:
            raise DataError(f"input {self.name!r} has the wrong shape", expected=str(self), found=array.shape)


@dataclasses.dataclass(frozen=True)
class RemoteModel:
    """A model as a server describes it."""

    name: str
    inputs: tuple[RemoteTensor, ...]
    outputs: tuple[RemoteTensor, ...]

    @classmethod
    def of(cls, metadata: Any) -> RemoteModel:
        """From the answer to ModelMetadata.

        Raises:
            EngineError: a tensor of a dtype that arrays do not have.
        """
        found = [
            tuple(RemoteTensor(t.name, t.datatype, tuple(t.shape)) for t in tensors)
            for tensors in (metadata.inputs, metadata.outputs)
        ]
        for tensor in (*found[0], *found[1]):
            if tensor.datatype not in DTYPES:
                raise EngineError(f"tensor {tensor.name!r} of {metadata.name} has the dtype {tensor.datatype}")
        return cls(metadata.name, *found)

    def check(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Checks arrays against the inputs' names, dtypes and shapes.

        Raises:
            DataError: the first thing that does not fit.
        """
        check_names([tensor.name for tensor in self.inputs], inputs)
        for tensor in self.inputs:
            tensor.check(inputs[tensor.name])


def request(model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] = ()) -> Any:
    """A message ModelInferRequest; of all outputs where none are named."""
    from tritonclient.grpc import service_pb2

    message = service_pb2.ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        message.inputs.add(name=name, datatype=TYPES[array.dtype.name], shape=array.shape)
        message.raw_input_contents.append(np.ascontiguousarray(array).tobytes())
    for name in outputs:
        message.outputs.add(name=name)
    return message


def infer_input(name: str, array: np.ndarray) -> Any:
    """An input as tritonclient takes it."""
    from tritonclient.grpc import InferInput
    from tritonclient.utils import np_to_triton_dtype

    return InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)).set_data_from_numpy(array)


def packed_call(channel: Any) -> Any:
    """The call ModelInfer on messages that were packed before, with answers as they come: nothing but what it takes."""
    return channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")


def response(answer: bytes) -> Any:
    """The message ModelInferResponse of an answer to `packed_call`.

    Raises:
        EngineError: it is none.
    """
    from google.protobuf.message import DecodeError
    from tritonclient.grpc import service_pb2

    try:
        return service_pb2.ModelInferResponse.FromString(answer)
    except DecodeError as error:
        raise EngineError("a server's answer is no message of the protocol", found=error) from error


def arrays(response: Any) -> dict[str, np.ndarray]:
    """The outputs of a message ModelInferResponse by name, each an array of its own memory.

    Raises:
        EngineError: an output whose bytes are not those of its shape.
    """
    return {
        tensor.name: _array(tensor, raw)
        for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def _array(tensor: Any, raw: bytes) -> np.ndarray:
    shape = tuple(tensor.shape)
    if tensor.datatype == "BF16":
        high = np.frombuffer(raw, np.uint16).astype(np.uint32) << 16
        return high.view(np.float32).reshape(shape)
    dtype = np.dtype(DTYPES[tensor.datatype])
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise EngineError(
            f"output {tensor.name!r} is not whole",
            expected=f"{math.prod(shape) * dtype.itemsize} bytes for {shape}",
            found=f"{len(raw)} bytes",
        )
    return np.frombuffer(bytearray(raw), dtype).reshape(shape)


def _grpc() -> Any:
    try:
        return importlib.import_module("tritonclient.grpc") and importlib.import_module("grpc")
    except ImportError as error:
        raise TargetUnavailableError(f"no client for the server: {error}", hint=CLIENT) from error


def _read(path: Path | None) -> bytes | None:
    try:
        return path.read_bytes() if path else None
    except OSError as error:
        raise UsageError(f"{path} cannot be read", found=error.strerror) from error


def _is_address(url: str) -> bool:
    host, colon, port = url.rpartition(":")
    return bool(host and colon) and "/" not in host and port.isdigit()
