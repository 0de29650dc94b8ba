from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from enginesmith.cli import cli
from enginesmith.errors import DataError, UsageError
from enginesmith.serving.load.payload import Payload, from_file, made_up
from enginesmith.serving.wire import RemoteModel, RemoteTensor

_server = runpy.run_path(str(Path(__file__).parents[3] / "inference_server.py"))
Doubling, listening, LOST = _server["Doubling"], _server["listening"], _server["LOST"]

SHORT = ["--duration", "0.5", "--warmup", "0.1"]
MODEL = RemoteModel(
    "net",
    (RemoteTensor("ids", "INT64", (-1, -1)), RemoteTensor("x", "FP16", (-1, 4))),
    (RemoteTensor("y", "FP32", (-1, 2)),),
)


def run(*arguments: str):
    return CliRunner().invoke(cli, ["load-test", *arguments], standalone_mode=False)


@pytest.fixture
def double():
    return Doubling()


@pytest.fixture
def url(double):
    with listening(double) as found:
        yield found


def test_closed_loops_open_loops_and_a_sweep(url, tmp_path):
    page = tmp_path / "load.html"
    ran = run(
        url, "-m", "double", "--clients", "1,4", "--rate", "50", "--sweep", *SHORT, "--json", "--report", str(page)
    )
    assert ran.return_value == 0, ran.output
    result = json.loads(ran.stdout)
    assert [row["clients"] for row in result["closed"]] == [1, 4]
    assert all(row["achieved"] > 0 and not row["errors"] for row in result["closed"])
    assert all(row["server"]["merged"] == 2 and row["server"]["queue_ms"] == 3 for row in result["closed"])
    assert len(result["open"]) == 10
    assert result["open"][0]["achieved"] == pytest.approx(50, rel=0.5)
    assert result["payload"]["checked"] is False
    text = page.read_text()
    assert "Clients that wait for each answer" in text
    assert "PASSED" in text
    assert "<svg" in text


def test_errors_are_counted_by_their_kind_and_fail_the_test(url, double):
    def lose(y: np.ndarray) -> np.ndarray:
        if len(double.requests) > 16:  # the first are sent before any clock runs
            double.failures = [LOST]  # of the next; every other one is answered
        return y

    double.change = lose
    ran = run(url, "-m", "double", "--clients", "", "--rate", "40", "--constant", *SHORT, "--json")
    result = json.loads(ran.stdout)
    assert ran.return_value == 1
    assert result["open"][0]["errors"]["UNAVAILABLE"] > 0
    assert "unavailable" in result["problems"][0]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--p99", "1us"], "p99 is "),
        (["--min-throughput", "1000000"], "requests/s at the most, less than 1e+06"),
    ],
)
def test_a_limit_that_is_missed(url, options, problem):
    ran = run(url, "-m", "double", "--clients", "2", *SHORT, *options)
    assert ran.return_value == 1
    assert f"failed: {problem}" in ran.output or problem in ran.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "which model is to be asked"),
        (["-m", "double", "--clients", "1,x"], "--clients cannot be read"),
        (["-m", "double", "--clients", ""], "there is nothing to measure"),
        (["-m", "double", "--clients", "", "--sweep"], "a sweep begins with a closed loop"),
        (["-m", "double", "--shape", "x=3"], "shape 'x=3' cannot be read"),
        (["-m", "double", "--shape", "z:3"], "the model has no input 'z'"),
        (["-m", "double", "--p99", "5"], "latency '5' cannot be read"),
        (["-m", "double", "-b", "bundle", "--data", "x.npz"], "requests come from a bundle or from data"),
        (["-m", "double", "-b", "nowhere"], "nowhere is not a bundle"),
        (["-m", "double", "--data", "nowhere.npz"], "nowhere.npz cannot be read"),
        (["-m", "double", "--record"], "there is no bundle to keep the result in"),
    ],
)
def test_options_that_cannot_be_used(url, options, message):
    ran = run(url, *options, *SHORT)
    assert ran.return_value == 2, ran.output
    assert message in ran.output
    assert "Traceback" not in ran.output


def test_a_bundle_that_cannot_be_written_is_an_error_before_anything_is_measured(url, double, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)
    ran = run(url, "-m", "double", "-b", str(tmp_path), "--record")
    assert ran.return_value == 2
    assert f"{tmp_path} cannot be written" in ran.output
    assert not double.requests


def test_a_server_that_refuses_the_requests(url, double):
    import grpc

    double.failures = [(grpc.StatusCode.INVALID_ARGUMENT, "no such batch")] * 16
    ran = run(url, "-m", "double", *SHORT)
    assert ran.return_value == 4
    assert "the server does not answer a request of random numbers" in ran.output
    assert "no such batch" in ran.output


def test_random_values_have_the_shapes_that_the_model_wants():
    payload = made_up(MODEL, {"ids": (2, 7)}, 2, 0)
    shapes = {tensor.name: tuple(tensor.shape) for tensor in payload.messages[0].inputs}
    assert shapes == {"ids": (2, 7), "x": (2, 4)}
    ids = np.frombuffer(payload.messages[0].raw_input_contents[0], np.int64)
    assert set(ids) <= {0, 1}


def test_an_axis_of_any_size_has_to_be_given():
    with pytest.raises(UsageError, match="input 'ids' has axes of any size"):
        made_up(MODEL, {}, 1, 0)


def test_rows_of_a_file(tmp_path):
    file = tmp_path / "data.npz"
    np.savez(file, ids=np.ones((5, 3), np.int64), x=np.ones((5, 4), np.float16), label=np.arange(5))
    payload = from_file(MODEL, file, 2)
    assert len(payload.messages) == 2
    assert [tensor.name for tensor in payload.messages[0].inputs] == ["ids", "x"]
    with pytest.raises(DataError, match="has too few rows"):
        from_file(MODEL, file, 6)
    np.savez(file, ids=np.ones((5, 3), np.int64), x=np.ones((4, 4), np.float16))
    with pytest.raises(DataError, match="have different numbers of rows"):
        from_file(MODEL, file, 1)
    np.savez(file, ids=np.ones((5, 3), np.int64), x=np.ones((5, 4), np.float32))
    with pytest.raises(DataError, match="input 'x' has the wrong dtype"):
        from_file(MODEL, file, 1)


def packed(value):
    from tritonclient.grpc import service_pb2

    message = service_pb2.ModelInferResponse()
    message.outputs.add(name="y", datatype="FP32", shape=[1, 2])
    message.raw_output_contents.append(np.array([1.0, value], np.float32).tobytes())
    return message.SerializeToString()


def test_answers_are_judged_and_those_known_to_be_right_only_once(monkeypatch):
    expected = {"y": np.array([[1.0, 2.0]], np.float32)}
    judge = Payload("rows", (None, None), (expected, {"y": -expected["y"]}), 1e-3).judge()
    assert judge(0, packed(2.0))
    assert not judge(1, packed(2.0))  # right for the other request alone
    assert judge(0, packed(2.0001))
    for wrong in (packed(2.1), packed(np.nan), b"", b"\xff\xff"):
        assert not judge(0, wrong)
        assert not judge(0, wrong)
    monkeypatch.setattr(Payload, "_is_right", lambda self, number, answer: pytest.fail("computed again"))
    assert judge(0, packed(2.0))


def test_all_answers_are_right_where_none_are_expected():
    assert Payload("random numbers", (None,)).judge()(0, b"\xff\xff")
