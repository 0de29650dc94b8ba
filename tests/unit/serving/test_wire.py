from __future__ import annotations

import numpy as np
import pytest

from enginesmith.errors import EngineError
from enginesmith.serving.layout import TYPES
from enginesmith.serving.wire import arrays, request, response

service_pb2 = pytest.importorskip("tritonclient.grpc.service_pb2")


def answer(datatype: str, shape: tuple[int, ...], raw: bytes):
    message = service_pb2.ModelInferResponse()
    message.outputs.add(name="y", datatype=datatype, shape=shape)
    message.raw_output_contents.append(raw)
    return message


@pytest.mark.parametrize("name", [name for name in TYPES if name != "bfloat16"])
def test_arrays_of_every_dtype_go_there_and_back(name):
    array = np.arange(6).reshape(2, 3).astype(name)
    message = request("net", {"x": array.T})
    back = answer(message.inputs[0].datatype, tuple(message.inputs[0].shape), message.raw_input_contents[0])
    found = arrays(back)["y"]
    assert found.dtype == array.dtype
    assert (found == array.T).all()
    found[0, 0] = 1  # memory of its own


def test_bfloat16_is_read_as_float32():
    values = np.array([1.0, -2.5, 3e30], np.float32)
    raw = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    found = arrays(answer("BF16", (3,), raw))["y"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, values, rtol=1e-2)


def test_an_output_that_is_not_whole():
    with pytest.raises(EngineError, match="output 'y' is not whole"):
        arrays(answer("FP32", (2, 3), b"\0" * 20))


def test_an_answer_that_is_no_message():
    with pytest.raises(EngineError, match="a server's answer is no message of the protocol"):
        response(b"\xff\xff")
