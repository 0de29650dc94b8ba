"""A language model as a service: real processes, tokens one by one, requests that share the engine's calls."""

from __future__ import annotations

import itertools
import runpy
import signal
import threading
import time
from pathlib import Path

import pytest

import enginesmith
from enginesmith.errors import DataError, EngineError

triton = pytest.importorskip("tritonclient.grpc")

HELPERS = Path(__file__).parents[1]
Served = runpy.run_path(str(HELPERS / "serving_process.py"))["Served"]
small = runpy.run_path(str(HELPERS / "small_decoder.py"))

pytestmark = pytest.mark.slow
PROMPT = [3, 1, 4]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """One server for all; the last test stops it."""
    folder = tmp_path_factory.mktemp("served")
    served = Served(small["write_bundle"](folder / "decoder"), folder)
    yield served
    served.end()


@pytest.fixture
def client(served):
    with enginesmith.Client(served.url, served.model, deadline_s=60) as client:
        yield client


def test_tokens_are_those_without_a_cache(client):
    assert list(client.generate(PROMPT, 8)) == small["greedy"](PROMPT, 8)


def test_many_requests_at_once_get_what_each_gets_alone(served):
    prompts = [[3, 1, 4], [1], [5, 9, 2, 6, 5], [2, 7], [0, 0, 8], [10]]
    found = {}

    def ask(number):
        with enginesmith.Client(served.url, served.model, deadline_s=60) as client:
            prompt = prompts[number % len(prompts)]
            found[number] = list(client.generate(prompt, 3 + number % 5)) == small["greedy"](prompt, 3 + number % 5)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(18), True)


def test_what_is_drawn_depends_on_the_seed_alone(client):
    first, other, again = (list(client.generate(PROMPT, 8, temperature=30.0, seed=seed)) for seed in (1, 2, 1))
    assert first == again != other
    assert list(client.generate(PROMPT, 8, top_k=1)) == small["greedy"](PROMPT, 8)


def test_a_text_ends_at_a_stop_token(client):
    expected = small["greedy"](PROMPT, 8)
    found = list(client.generate(PROMPT, 8, stop=[expected[3]]))
    assert found == expected[: expected.index(expected[3]) + 1]


def test_a_client_that_leaves_ends_its_request_alone(client):
    tokens = client.generate(PROMPT, 13)
    assert list(itertools.islice(tokens, 2)) == small["greedy"](PROMPT, 2)
    tokens.close()
    assert list(client.generate(PROMPT, 8)) == small["greedy"](PROMPT, 8)


def test_clients_that_leave_all_the_time_are_no_trouble(served):
    def ask_and_leave():
        with enginesmith.Client(served.url, served.model, deadline_s=60) as client:
            for number in range(50):
                tokens = client.generate(PROMPT, 13)
                for _ in range(number % 4 + 1):
                    next(tokens)
                tokens.close()

    server = served.server().pid
    threads = [threading.Thread(target=ask_and_leave) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert served.server().pid == server
    assert "trouble" not in served.log()


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([1] * 17, {}, "prompt 0 is longer than the cache"),
        ([1] * 14, {"max_new_tokens": 3}, "prompt 0 leaves no room for 3 new tokens"),
        ([11], {"max_new_tokens": 3}, "prompt 0 holds a token that the model does not know"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is too small"),
        ([1], {"max_new_tokens": 3, "temperature": 0.0}, "temperature is out of range"),
    ],
)
def test_wrong_requests_get_the_engines_errors(client, prompt, options, message):
    with pytest.raises(EngineError, match=message):
        list(client.generate(prompt, **options))


def test_what_is_no_prompt_is_not_sent(client):
    with pytest.raises(DataError, match="prompt 0 is empty"):
        list(client.generate([]))


def test_a_killed_model_process_is_replaced(served, client):
    before = {process.pid for process in served.models()}
    for process in served.models():
        process.kill()
    served.wait_for_log("recovered: a real inference answers again")
    assert not before & {process.pid for process in served.models()}
    assert list(client.generate(PROMPT, 8)) == small["greedy"](PROMPT, 8)


def test_a_reload_lets_texts_come_to_their_end(served):
    right, over = [], threading.Event()

    def ask():
        with enginesmith.Client(served.url, served.model, deadline_s=60, retries=0) as client:
            while not over.is_set():
                right.append(list(client.generate(PROMPT, 13)) == small["greedy"](PROMPT, 13))

    thread = threading.Thread(target=ask)
    thread.start()
    served.process.send_signal(signal.SIGHUP)
    try:
        served.wait_for_log("reloaded: engine")
        count = len(right)
        while len(right) < count + 2 and thread.is_alive():
            time.sleep(0.01)
    finally:
        over.set()
        thread.join()
    assert len(right) > count
    assert all(right)


def test_sigterm_lets_texts_come_to_their_end(served):
    texts = []

    def ask():
        with enginesmith.Client(served.url, served.model, deadline_s=60) as client:
            tokens = client.generate(PROMPT, 13)
            texts.append([next(tokens)])
            begun.release()
            texts[-1].extend(tokens)

    begun = threading.Semaphore(0)
    thread = threading.Thread(target=ask)
    thread.start()
    begun.acquire()
    start = time.monotonic()
    assert served.end() == 0, served.log()
    thread.join()
    assert time.monotonic() - start < 60
    assert texts == [small["greedy"](PROMPT, 13)]
    assert served.leftovers() == []
