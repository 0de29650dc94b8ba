"""A stream of tokens that its reader leaves."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from enginesmith.serving import stream

pb = pytest.importorskip("tritonclient.grpc.service_pb2")
grpc = pytest.importorskip("grpc")


class Server:
    """Answers each message as a text without end, until it is told of its end, or the call is cancelled.

    Args:
        ends: whether it knows the text that is to end: "at once", "never", or "elsewhere" where it does not.
    """

    def __init__(self, ends):
        self._ends = ends
        self.messages, self.cancelled = [], False

    def ModelStreamInfer(self, messages, timeout):  # noqa: N802
        self._incoming = messages
        self.messages.append(next(messages))
        return self

    def __iter__(self):
        for number in itertools.count():
            if number == 3:
                self.messages.append(next(self._incoming))
                if self._ends == "elsewhere":
                    yield pb.ModelStreamInferResponse(error_message="there is no such text here")
                elif self._ends == "at once":
                    yield self._answer([], last=True)
                    return
                while not self.cancelled:
                    time.sleep(0.001)
                raise grpc.RpcError
            yield self._answer([number], last=False)

    def cancel(self):
        self.cancelled = True

    @staticmethod
    def _answer(tokens, *, last):
        answer = pb.ModelStreamInferResponse()
        answer.infer_response.parameters["triton_final_response"].bool_param = last
        for token in tokens:
            answer.infer_response.outputs.add(name="token", datatype="INT64", shape=[1])
            answer.infer_response.raw_output_contents.append(np.int64(token).tobytes())
        return answer


@pytest.mark.parametrize(("ends", "cancelled"), [("at once", False), ("elsewhere", True), ("never", True)])
def test_who_leaves_a_text_tells_the_server_and_cancels_only_where_that_does_not_help(monkeypatch, ends, cancelled):
    monkeypatch.setattr(stream, "ENDING_S", 0.05)
    server = Server(ends)
    tokens = stream.tokens(server, stream.prompt("gpt", np.array([3, 1, 4]), {}), 60)
    assert list(itertools.islice(tokens, 3)) == [0, 1, 2]
    tokens.close()
    text, enough = server.messages
    assert enough.model_name == "gpt"
    assert enough.parameters["cancel"].string_param == text.parameters["text"].string_param != ""
    assert server.cancelled is cancelled
