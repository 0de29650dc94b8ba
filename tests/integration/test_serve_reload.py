"""`enginesmith serve` takes another bundle in place of the one that it serves, under load, or refuses it."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc")

import tritonclient.grpc as triton

TESTS = Path(__file__).parents[1]
helpers = {name: runpy.run_path(str(TESTS / f"{name}.py")) for name in ("serving_load", "serving_process")}
Load, ask = (helpers["serving_load"][name] for name in ("Load", "ask"))
Served = helpers["serving_process"]["Served"]
small = runpy.run_path(str(TESTS / "small_bundles.py"))
write_bundle, W = small["write_bundle"], small["W"]

pytestmark = pytest.mark.slow
X = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture(scope="module")
def link(tmp_path_factory):
    """Where the bundle is served from: a link to one of several versions."""
    found = tmp_path_factory.mktemp("bundles") / "net"
    found.symlink_to(write_bundle(found.with_name("v1"), times_ms={"plain": 1.0}))
    return found


@pytest.fixture(scope="module")
def served(link, tmp_path_factory):
    found = Served(link, tmp_path_factory.mktemp("served"), "--name", "net", "--probe-s", "1")
    yield found
    found.end()


@pytest.fixture
def client(served):
    return triton.InferenceServerClient(served.url)


def move(link: Path, bundle: Path) -> None:
    """Has the link lead to another bundle, at once."""
    partial = link.with_name("partial")
    partial.symlink_to(bundle)
    os.replace(partial, link)


def reload(served, said: str, client=None) -> str:
    """Asks for it, and waits for the line that says what came of it; the server has to be ready all the time."""
    count = served.log().count(said)
    served.process.send_signal(signal.SIGHUP)
    while served.log().count(said) == count:
        assert client is None or client.is_server_ready()
        assert served.process.poll() is None, served.log()
        time.sleep(0.02)
    return served.wait_for_log(said, count + 1)


def only(served) -> None:
    """Waits until one process runs the model: those that it does not need any more end soon."""
    deadline = time.monotonic() + 30
    while len(served.models()) > 1:
        assert time.monotonic() < deadline, served.models()
        time.sleep(0.05)


def test_a_reload_under_load_loses_no_request_and_answers_none_wrongly(served, link, client):
    before = served.models()[0].pid
    with Load(served.url, "net", weights=(W, 2 * W)) as load:
        load.wait_for(100)
        move(link, write_bundle(link.with_name("v2"), w=2 * W))
        line = reload(served, "reloaded: ", client)
        load.wait_for(100)
    assert f"reloaded: engine plain of {link} answers after " in line
    assert load.errors() == {}
    assert load.count("wrong") == 0
    assert ask(client, "net", X, weights=[2 * W]).outcome == "right"
    only(served)
    assert served.models()[0].pid != before
    assert "trouble" not in served.log()


def test_what_cannot_take_its_place_is_refused_and_nobody_notices(served, link, client):
    narrow = write_bundle(link.with_name("narrow"), described=small["signature"](1, 2, 4))
    wrong = write_bundle(link.with_name("wrong"), {"plain": "flipped"})
    served_by = served.models()[0].pid
    with Load(served.url, "net", threads=4, weights=(2 * W,)) as load:
        load.wait_for(20)
        for bundle, reason in (
            (narrow, "clients of the old model would fail: input 'x' was float32 (batch=1..4..8, 4), and is float32"),
            (wrong, "output 'left' is 0."),
            (link.with_name("nowhere"), "is not a bundle"),
        ):
            move(link, bundle)
            line = reload(served, "not reloaded, what was served goes on: ", client)
            assert reason in line
        load.wait_for(20)
    assert load.errors() == {}
    assert load.count("wrong") == 0
    only(served)
    assert served.models()[0].pid == served_by


def test_what_was_reloaded_is_healed_even_where_its_bundle_is_gone(served, link, client):
    shutil.rmtree(link.with_name("v2"))
    served.models()[0].kill()
    served.wait_for_log("recovered: a real inference answers again after")
    assert ask(client, "net", X, weights=[2 * W]).outcome == "right"


def test_it_stops_cleanly(served):
    assert served.end() == 0, served.log()
    assert served.leftovers() == []
