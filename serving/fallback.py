"""The kserve package where no Triton can run: the same protocol, without merging, for this machine only.

Its servicer answers from a gRPC server of our own making, since kserve's listens on every interface. Run as a process
of its own, which the supervisor watches like any other server: its messages and tritonclient's have the same names,
so that one process cannot import both.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .endpoint import Endpoint

PACKAGE = "kserve"
NOTE = (
    f"the package {PACKAGE} serves instead, on this machine only, and does not merge requests: expect less throughput"
)
_START = "import sys; sys.path[:] = sys.argv[2:]; from enginesmith.serving.fallback import main; main(sys.argv[1])"


def is_installed() -> bool:
    """Whether the package is there; it is not imported."""
    return importlib.util.find_spec(PACKAGE) is not None


def command(
    bundle: Path, name: str, engine: str | None, max_queue: int | None, drain_s: float, endpoint: Endpoint
) -> list[str]:
    """Starts it on an endpoint."""
    options = {
        "bundle": str(bundle.absolute()),
        "name": name,
        "engine": engine,
        "max_queue": max_queue,
        "drain_s": drain_s,
        "address": endpoint.url,
        "metrics": [endpoint.metrics_port, endpoint.metrics_host],
        "tls": [str(path) for path in (endpoint.cert, endpoint.key, endpoint.client_ca) if path],
    }
    return [sys.executable, "-c", _START, json.dumps(options), *sys.path]


def main(options: str) -> None:
    """The process."""
    sys.argv = ["enginesmith"]  # kserve reads options of its own when it is imported
    asyncio.run(_serve(**json.loads(options)))


async def _serve(
    bundle: str,
    name: str,
    engine: str | None,
    max_queue: int | None,
    drain_s: float,
    address: str,
    metrics: tuple[int | None, str],
    tls: list[str],
) -> None:
    import grpc
    from kserve import ModelRepository
    from kserve.protocol.dataplane import DataPlane
    from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
    from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
    from kserve.protocol.grpc.servicer import InferenceServicer
    from prometheus_client import start_http_server

    models = ModelRepository()
    models.update(_model(name, bundle, engine))
    server = grpc.aio.server(
        interceptors=(ExceptionToStatusInterceptor(),),
        maximum_concurrent_rpcs=max_queue,
        options=[
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.so_reuseport", 0),
        ],
    )
    add_GRPCInferenceServiceServicer_to_server(InferenceServicer(DataPlane(models), None), server)
    if tls:
        cert, key, *roots = (Path(path).read_bytes() for path in tls)
        pair = [(key, cert)]
        server.add_secure_port(address, grpc.ssl_server_credentials(pair, *roots, require_client_auth=bool(roots)))
    else:
        server.add_insecure_port(address)
    if metrics[0] is not None:
        start_http_server(metrics[0], metrics[1])
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await server.start()
    await ended.wait()
    await server.stop(grace=drain_s)


def _model(name: str, bundle: str, engine: str | None) -> Any:
    from kserve import InferOutput, InferRequest, InferResponse, Model
    from kserve.errors import InvalidInput
    from kserve.protocol.infer_type import InferInput
    from kserve.utils.numpy_codec import from_np_dtype

    from ..compiler.engine import load

    class Served(Model):  # type: ignore[misc]
        """An engine as kserve's model."""

        def __init__(self) -> None:
            super().__init__(name)
            self.engine = load(bundle, engine)
            self.ready = True

        async def predict(
            self, payload: InferRequest, headers: Mapping[str, str] | None = None, response_headers: Any = None
        ) -> InferResponse:
            """Runs one request; what does not fit the model is the caller's mistake."""
            wanted = [output.name for output in payload.request_outputs or ()]
            known = [spec.name for spec in self.engine.signature.outputs]
            if unknown := [output for output in wanted if output not in known]:
                raise InvalidInput(f"unexpected inference output {unknown[0]!r} for model {name!r}")
            inputs = {tensor.name: _array(tensor, InvalidInput) for tensor in payload.inputs}
            try:
                outputs = await asyncio.to_thread(self.engine.run, inputs)
            except DataError as error:
                raise InvalidInput(f"[request id: {payload.id}] {' '.join(str(error).split())}") from error
            given = []
            for key in wanted or known:
                array = np.ascontiguousarray(outputs[key])
                given.append(InferOutput(key, list(array.shape), from_np_dtype(array.dtype)))
                given[-1].set_data_from_numpy(array)
            return InferResponse(payload.id, name, given)

    def _array(tensor: InferInput, refuse: type[Exception]) -> np.ndarray:
        try:
            array: np.ndarray = tensor.as_numpy()
        except (ValueError, InvalidInput) as error:
            raise refuse(f"input {tensor.name!r} does not fit its shape {tensor.shape}: {error}") from error
        return array

    return Served()


def environment() -> dict[str, str]:
    """What it is started with."""
    return dict(os.environ)
