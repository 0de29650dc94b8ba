from __future__ import annotations

import runpy
from pathlib import Path

import grpc
import numpy as np
import pytest

import enginesmith
from enginesmith.errors import DataError, EngineError, UsageError
from enginesmith.serving import client as module
from enginesmith.serving.wire import Access

_server = runpy.run_path(str(Path(__file__).parents[2] / "inference_server.py"))
Doubling, listening, LOST = _server["Doubling"], _server["listening"], _server["LOST"]
X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def double():
    return Doubling()


@pytest.fixture
def client(double):
    with listening(double) as url, enginesmith.Client(url, "double", deadline_s=5) as found:
        yield found


def test_arrays_go_in_and_come_out_by_name(client):
    assert (client(x=X)["y"] == 2 * X).all()
    assert (client({"x": X}, outputs=["y"])["y"] == 2 * X).all()


def test_what_is_said_of_a_call_goes_along(client, double):
    client(x=X, request_id="order-1", priority=2, deadline_s=0.5)
    message = double.requests[0]
    assert message.id == "order-1"
    assert message.parameters["priority"].uint64_param == 2
    assert message.parameters["timeout"].int64_param == 500_000


def test_many_calls_at_once(client):
    futures = [client.submit({"x": X * number}) for number in range(50)]
    assert all((future.result()["y"] == 2 * X * number).all() for number, future in enumerate(futures))


@pytest.mark.parametrize(
    "lost",
    [
        LOST,
        (grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size"),
        (grpc.StatusCode.INTERNAL, "Stub process 'net_0' is not healthy."),
        (grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'double' has no available versions"),
    ],
)
def test_a_call_that_was_not_answered_is_sent_again(client, double, lost):
    double.failures = [lost, lost]
    assert (client(x=X)["y"] == 2 * X).all()
    assert len(double.requests) == 3


def test_a_call_is_sent_again_until_its_deadline(client, double, monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 1e-6)
    double.failures = [LOST] * 15
    assert (client(x=X)["y"] == 2 * X).all()
    double.failures = [LOST] * 1_000_000
    with pytest.raises(EngineError, match=r"did not answer a call of double|no answer from"):
        client(x=X, deadline_s=0.2)


def test_a_call_that_may_be_what_kills_the_model_is_sent_a_few_times_only(client, double, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_PAUSE_S", 1e-6)
    double.failures = [(grpc.StatusCode.INTERNAL, "Stub process 'net_0' is not healthy.")] * 100
    with pytest.raises(EngineError, match="did not answer a call of double"):
        client(x=X)
    assert len(double.requests) == 1 + module.DEATHS


def test_a_call_is_sent_again_as_often_as_is_asked_for(double):
    double.failures = [LOST] * 10
    with (
        listening(double) as url,
        enginesmith.Client(url, "double", deadline_s=5, retries=2) as client,
        pytest.raises(EngineError, match="did not answer a call of double") as caught,
    ):
        client(x=X)
    assert caught.value.found == "UNAVAILABLE: Socket closed"
    assert len(double.requests) == 3


def test_what_the_model_fails_on_is_not_sent_again(client, double):
    double.failures = [(grpc.StatusCode.INTERNAL, "index 7 is out of range")]
    with pytest.raises(EngineError, match="did not answer a call of double"):
        client(x=X)
    assert len(double.requests) == 1


def test_what_the_server_finds_wrong_with_the_inputs_is_an_error_of_data(client, double):
    double.failures = [(grpc.StatusCode.INVALID_ARGUMENT, "batch-size must be <= 64")]
    with pytest.raises(DataError, match="the server refuses the inputs of double: batch-size must be <= 64"):
        client(x=X)


def test_an_answer_that_is_late(client, double):
    double.pause_s = 1
    with pytest.raises(EngineError, match=r"no answer from 127\.0\.0\.1:\d+ within 0\.2 s"):
        client(x=X, deadline_s=0.2)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input 'x' is missing"),
        ({"x": X, "z": X}, "the model has no input 'z'"),
        ({"x": X.astype(np.float64)}, "input 'x' has the wrong dtype"),
        ({"x": X[:, :2]}, "input 'x' has the wrong shape"),
        ({"x": X[0]}, "input 'x' has the wrong shape"),
    ],
)
def test_inputs_that_do_not_fit_are_not_sent(client, double, inputs, message):
    with pytest.raises(DataError, match=message):
        client(inputs)
    assert not double.requests


def test_an_unknown_model():
    with (
        listening(Doubling()) as url,
        enginesmith.Client(url, "triple") as client,
        pytest.raises(UsageError, match="serves no model 'triple'"),
    ):
        client(x=X)


def test_a_dtype_that_arrays_do_not_have(double):
    double.inputs = [("text", "BYTES", (-1,))]
    with (
        listening(double) as url,
        enginesmith.Client(url, "double") as client,
        pytest.raises(EngineError, match="tensor 'text' of double has the dtype BYTES"),
    ):
        client(text=X)


def test_nobody_answers():
    with listening(Doubling()) as url:
        pass
    with enginesmith.Client(url, "double", deadline_s=1) as client, pytest.raises(EngineError, match="did not answer"):
        client(x=X)


def test_calls_go_round_and_lose_nothing_when_a_server_ends():
    first, second = Doubling(), Doubling()
    with listening(first) as one:
        with listening(second) as other, enginesmith.Client([one, other], "double", deadline_s=10) as client:
            for _ in range(20):
                client(x=X)
            assert first.requests
            assert second.requests
            client.submit({"x": X}).result()
        with enginesmith.Client([one, other], "double", deadline_s=10) as client:
            answers = [client.submit({"x": X}) for _ in range(20)]
            assert all((answer.result()["y"] == 2 * X).all() for answer in answers)


@pytest.mark.parametrize("url", ["localhost", "http://localhost:8001", ":8001", "host:port", ""])
def test_an_address_that_is_none(url):
    with pytest.raises(UsageError, match="a server's address cannot be read"):
        enginesmith.Client(url, "double")


def test_a_certificate_without_its_key(tmp_path):
    with pytest.raises(UsageError, match="a client's certificate needs its key"):
        Access(("h:1",), cert=tmp_path / "cert.pem")
    with pytest.raises(UsageError, match=r"root\.pem cannot be read"):
        Access(("h:1",), root=tmp_path / "root.pem").channel()


def test_several_addresses_are_one_target():
    assert Access(("10.0.0.1:1", "10.0.0.2:2")).target == "ipv4:10.0.0.1:1,10.0.0.2:2"
    assert Access(("[::1]:1", "[::2]:2")).target == "ipv6:[::1]:1,[::2]:2"
    assert Access(("service:8001",)).target == "service:8001"
