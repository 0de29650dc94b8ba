"""A server of the protocol within this process: doubles its input, and does on the way what a test wants of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from enginesmith.serving.wire import arrays

Failure = tuple[grpc.StatusCode, str]
LOST: Failure = (grpc.StatusCode.UNAVAILABLE, "Socket closed")


class Doubling(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Model "double": x (any rows, 3) float32 to y.

    Attributes:
        failures: what the next calls fail with; answers follow.
        requests: that came in.
        change: what is done to outputs before they are sent.
    """

    def __init__(self) -> None:
        self.failures: list[Failure] = []
        self.requests: list[Any] = []
        self.change: Callable[[np.ndarray], np.ndarray] = lambda y: y
        self.pause_s = 0.0
        self.inputs = [("x", "FP32", (-1, 3))]

    def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802, as the protocol names it
        if request.name != "double":
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        answer = service_pb2.ModelMetadataResponse(name="double")
        for name, datatype, shape in self.inputs:
            answer.inputs.add(name=name, datatype=datatype, shape=shape)
        answer.outputs.add(name="y", datatype="FP32", shape=(-1, 3))
        return answer

    def ModelStatistics(self, request: Any, context: Any) -> Any:  # noqa: N802, as above
        answer = service_pb2.ModelStatisticsResponse()
        count = len(self.requests)
        stats = answer.model_stats.add(name="double", inference_count=2 * count, execution_count=count)
        stats.inference_stats.success.count = count
        stats.inference_stats.queue.ns = count * 3_000_000
        return answer

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802, as above
        self.requests.append(request)
        time.sleep(self.pause_s)
        if self.failures:
            context.abort(*self.failures.pop(0))
        x = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(tuple(request.inputs[0].shape))
        y = self.change(2 * x)
        answer = service_pb2.ModelInferResponse(model_name="double", id=request.id)
        answer.outputs.add(name="y", datatype="FP32", shape=y.shape)
        answer.raw_output_contents.append(np.ascontiguousarray(y).tobytes())
        assert set(arrays(answer)) == {"y"}
        return answer


@contextmanager
def listening(servicer: Doubling, port: int = 0) -> Iterator[str]:
    """Its address while it listens."""
    server = grpc.server(ThreadPoolExecutor(16))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
