"""`enginesmith serve` with a real server, real clients, and processes that are killed."""

from __future__ import annotations

import re
import runpy
import signal
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc")

import grpc
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

import enginesmith

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
helpers = {name: runpy.run_path(str(TESTS / f"{name}.py")) for name in ("serving_load", "serving_process")}
Load, ask, infer_input = (helpers["serving_load"][name] for name in ("Load", "ask", "infer_input"))
Served = helpers["serving_process"]["Served"]
write_bundle = runpy.run_path(str(TESTS / "small_bundles.py"))["write_bundle"]

pytestmark = pytest.mark.slow
X = np.arange(4, dtype=np.float32).reshape(1, 4)
ROW = X.tobytes()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """One server for all; the last test stops it."""
    folder = tmp_path_factory.mktemp("served")
    bundle = write_bundle(folder / "net", {"slow": "slow"}, times_ms={"slow": 1.0})
    served = Served(bundle, folder, "--max-queue", "16", "--probe-s", "1", "--log-requests", "1")
    yield served
    served.end()


@pytest.fixture
def client(served):
    return triton.InferenceServerClient(served.url)


def request(name="x", kind="FP32", shape=(1, 4), data=ROW, output="left", model="net", version=""):
    """A request as it goes over the wire, so that it may be wrong in any way."""
    asked = service_pb2.ModelInferRequest(model_name=model, model_version=version, id="wrong-1")
    if name:
        asked.inputs.add(name=name, datatype=kind, shape=shape)
        asked.raw_input_contents.append(data)
    asked.outputs.add(name=output)
    return asked


SIZE = r"input byte size mismatch for input 'x' for model 'net'. Expected 16, got "
SHAPE = r"unexpected shape for input 'x' .* Expected \[-1,4\], got "
BAD = {
    "shape": (request(shape=(1, 5), data=bytes(20)), SHAPE + r"\[1,5\]"),
    "rank": (request(shape=(4,)), SHAPE + r"\[4\]"),
    "dtype": (request(kind="INT32"), "inference input 'x' data-type is 'INT32', but model 'net' expects 'FP32'"),
    "input name": (request(name="z"), "unexpected inference input 'z' for model 'net'"),
    "no input": (request(name=""), r"expected 1 inputs but got 0 .* missing required input\(s\) \['x'\]"),
    "output name": (request(output="z"), "unexpected inference output 'z' for model 'net'"),
    "truncated": (request(data=bytes(15)), f"{SIZE}15"),
    "no bytes": (request(data=b""), f"{SIZE}0"),
    "too many bytes": (request(data=bytes(64 << 20)), f"{SIZE}{64 << 20}"),
    "too many rows": (request(shape=(9, 4), data=bytes(144)), "inference request batch-size must be <= 8 for 'net'"),
    "no rows": (request(shape=(0, 4), data=b""), f"{SIZE}0"),
    "model": (request(model="nit"), "unknown model: 'nit' is not found"),
    "version": (request(version="7"), "unknown model: 'net' version 7 is not found"),
}
"""Requests that are wrong in one way, and the error that each gets."""


def test_wrong_requests_get_exact_errors_and_harm_nobody_beside_them(served, client):
    before = served.models()[0].pid
    with Load(served.url, served.model, threads=4) as load:
        for what, (asked, message) in BAD.items():
            for _ in range(3):
                with pytest.raises(grpc.RpcError, match=message) as refused:
                    client._client_stub.ModelInfer(asked, timeout=10)
                wanted = "NOT_FOUND" if what in ("model", "version") else "INVALID_ARGUMENT"
                assert refused.value.code().name == wanted, what
        load.wait_for(50)
    assert load.count("wrong") == 0
    assert load.errors() == {}
    assert served.models()[0].pid == before
    assert ask(client, served.model, X).outcome == "right"


@pytest.mark.parametrize("service", ["load_model", "unload_model"])
def test_only_who_has_the_secret_changes_the_server(served, client, service):
    with pytest.raises(InferenceServerException, match="This protocol is restricted"):
        getattr(client, service)(served.model)


def test_metrics_show_merging_and_the_dashboard_asks_for_no_others(served):
    with Load(served.url, served.model, threads=12) as load:
        load.wait_for(50)
    with urllib.request.urlopen(served.info["metrics"], timeout=10) as answer:
        text = answer.read().decode()
    values = dict(re.findall(r'^(nv_inference_\w+){model="net",version="1"} (\d+)$', text, re.MULTILINE))
    assert int(values["nv_inference_count"]) > 1.5 * int(values["nv_inference_exec_count"])
    asked = set(re.findall(r"nv_\w+", (ROOT / "samples" / "serving" / "grafana-dashboard.json").read_text()))
    assert len(asked) > 8
    assert {name for name in asked if name not in text and not name.startswith("nv_gpu_")} == set()


def test_requests_are_logged_with_their_ids(served, client):
    client.infer(served.model, [infer_input(X)], request_id="order-4711")
    line = served.wait_for_log("request order-4711")
    assert re.search(r"request order-4711: [\d.]+ ms, of which [\d.]+ in the queue, [\d.]+ in the model", line)


def test_killed_model_processes_are_replaced_and_no_answer_is_wrong(served):
    server = served.server().pid
    for count in range(3):
        victim = served.models()[0]
        with Load(served.url, served.model) as load:
            load.wait_for(20)
            victim.kill()
            line = served.wait_for_log("recovered: a real inference answers again after", count + 1)
            load.wait_for(50)
        assert re.search(r"after [\d.]+ s$", line)
        assert load.count("wrong") == 0
        assert all(re.search("INTERNAL|UNAVAILABLE", error) for error in load.errors()), load.errors()
        assert f"trouble: process {victim.pid} of model 'net' died" in served.log()
        assert victim.pid not in [process.pid for process in served.models()]
        assert served.server().pid == server


def test_a_killed_server_is_started_again_on_the_same_port(served):
    victim = served.server()
    recoveries = served.log().count("recovered:")
    with Load(served.url, served.model) as load:
        load.wait_for(20)
        victim.kill()
        served.wait_for_log("recovered:", recoveries + 1)
        load.wait_for(50)
    assert load.count("wrong") == 0
    assert all("UNAVAILABLE" in error for error in load.errors()), load.errors()
    assert f"trouble: the server (process {victim.pid}) ended with signal SIGKILL" in served.log()


def test_clients_that_send_again_lose_nothing_where_there_is_one_server(served):
    stop, begun = threading.Event(), threading.Barrier(5)

    def answers(client, number):
        x = X + number
        expected = client(x=x)["left"]
        begun.wait(60)
        count = 0
        while not stop.is_set():
            np.testing.assert_allclose(client(x=x)["left"], expected, rtol=1e-5)
            count += 1
        return count

    recoveries = served.log().count("recovered:")
    with enginesmith.Client(served.url, served.model, deadline_s=60) as client, ThreadPoolExecutor(4) as pool:
        found = [pool.submit(answers, client, number) for number in range(4)]
        try:
            begun.wait(60)
            for count, victim in enumerate((served.models()[0], served.server()), 1):
                victim.kill()
                served.wait_for_log("recovered:", recoveries + count)
        finally:
            stop.set()
        assert all(future.result() for future in found)


def test_sigterm_answers_what_was_accepted_and_leaves_nothing(served):
    with Load(served.url, served.model, threads=12) as load:
        load.wait_for(50)
        asked_at = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        code = served.process.wait(timeout=60)
    assert load.unanswered(asked_at) == []
    assert load.count("wrong") == 0
    assert code == 0, served.log()
    assert "stopped: all requests were answered" in served.log()
    assert served.leftovers() == []
