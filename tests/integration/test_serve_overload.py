"""`enginesmith serve` that is asked for more than it can do: queue limits, deadlines and priorities, by a real client.

The model works as long as a request says, so that tests can keep both of its instances busy while others queue up.
"""

from __future__ import annotations

import contextlib
import re
import runpy
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc")

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

TESTS = Path(__file__).parents[1]
helpers = {name: runpy.run_path(str(TESTS / f"{name}.py")) for name in ("serving_load", "serving_process")}
ask, infer_input = (helpers["serving_load"][name] for name in ("ask", "infer_input"))
Served = helpers["serving_process"]["Served"]
small = runpy.run_path(str(TESTS / "small_bundles.py"))

pytestmark = pytest.mark.slow
INSTANCES, QUEUE, ROWS, ENOUGH = 2, 8, 8, 70
"""Requests of as many rows as the model takes at once are merged with no others."""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    bundle = small["write_bundle"](folder / "net", {"patient": "patient"}, times_ms={"patient": 1.0})
    options = ["--instances", INSTANCES, "--max-queue", QUEUE, "--timeout-ms", 60_000, "--priorities", 2]
    found = Served(bundle, folder, *map(str, options), "--probe-s", "600")
    yield found
    assert found.end() == 0, found.log()


@pytest.fixture(scope="module")
def per_second(served):
    """How many rounds the model makes in a second here."""
    client = triton.InferenceServerClient(served.url)
    ask(client, served.model, rounds(1))
    return 300 / min(ask(client, served.model, rounds(300)).took_s for _ in range(2))


def rounds(count: float) -> np.ndarray:
    """A request that keeps an instance busy for so many rounds."""
    return np.full((ROWS, 4), count, np.float32)


class Requests:
    """Sends requests without waiting for their answers, and notes the order in which these come."""

    def __init__(self, served) -> None:
        self._client, self._model = triton.InferenceServerClient(served.url), served.model
        self._lock = threading.Lock()
        self.finished: list[str] = []

    def send(self, name: str, x: np.ndarray, **options) -> Future[bool]:
        """Whether the answer is right, once it is there."""
        future: Future[bool] = Future()

        def answered(result, error) -> None:
            with self._lock:
                self.finished.append(name)
            if error:
                future.set_exception(error)
                return
            expected = small["network"](x)
            future.set_result(all(np.allclose(result.as_numpy(key), expected[key], rtol=1e-4) for key in expected))

        self._client.async_infer(self._model, [infer_input(x)], answered, client_timeout=60, **options)
        return future


def pending(served) -> int:
    with urllib.request.urlopen(served.info["metrics"], timeout=10) as answer:
        (found,) = re.findall(r"^nv_inference_pending_request_count{[^}]*} (\d+)$", answer.read().decode(), re.M)
    return int(found)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def both_busy(served, per_second) -> Iterator[Requests]:
    """While both instances work on a request of about a second; afterwards these are answered."""
    processes = served.models()
    assert len(processes) == INSTANCES
    used = [sum(process.cpu_times()[:2]) for process in processes]
    requests = Requests(served)
    blocks = [requests.send("block", rounds(per_second)) for _ in processes]
    wait_for(lambda: all(sum(p.cpu_times()[:2]) > before + 0.05 for p, before in zip(processes, used, strict=True)))
    yield requests
    assert all(block.result() for block in blocks)


def test_a_full_queue_refuses_at_once_and_answers_what_it_took(served, per_second):
    with both_busy(served, per_second) as requests:
        taken = [requests.send("taken", rounds(1)) for _ in range(QUEUE)]
        wait_for(lambda: pending(served) == QUEUE)
        for refused in [requests.send("refused", rounds(1)) for _ in range(5)]:
            with pytest.raises(InferenceServerException, match="Exceeds maximum queue size") as error:
                refused.result()
            assert error.value.status() == "StatusCode.UNAVAILABLE"
        assert requests.finished == ["refused"] * 5  # nobody else was answered yet
    assert all(request.result() for request in taken)


def test_a_request_beyond_its_own_deadline_is_refused_as_such_and_the_others_are_answered(served, per_second):
    with both_busy(served, per_second) as requests:
        late = requests.send("late", rounds(1), timeout=100_000)  # microseconds
        patient = requests.send("patient", rounds(1), timeout=50_000_000)
        without = requests.send("without", rounds(1))
    with pytest.raises(InferenceServerException, match="Request timeout expired") as error:
        late.result()
    assert error.value.status() == "StatusCode.UNAVAILABLE"
    assert patient.result()
    assert without.result()


def test_requests_of_the_first_priority_overtake_those_of_the_second(served, per_second):
    work = rounds(max(per_second / 30, 1))
    with both_busy(served, per_second) as requests:
        second = [requests.send("second", work, priority=2) for _ in range(4)]
        wait_for(lambda: pending(served) == 4)
        first = [requests.send("first", work, priority=1) for _ in range(4)]
        wait_for(lambda: pending(served) == 8)
    assert all(request.result() for request in [*second, *first])
    order = [name for name in requests.finished if name != "block"]
    assert order[:3] == ["first"] * 3  # the last of the first and the first of the second run side by side
    assert order[-3:] == ["second"] * 3


def test_what_is_accepted_waits_no_longer_than_the_queue_is(served, per_second):
    """By Little's law: of L requests in the queue and in the model, answered at a rate of R, each waits for L / R.

    64 clients that were all let in would wait for 64 / R.
    """
    work, answers, enough = rounds(max(per_second / 30, 1)), [], threading.Event()
    began = time.monotonic()

    def send() -> None:
        client = triton.InferenceServerClient(served.url, channel_args=[("grpc.use_local_subchannel_pool", 1)])
        while not enough.is_set():
            answers.append(ask(client, served.model, work))
            if answers[-1].outcome == "error":
                time.sleep(0.1)

    threads = [threading.Thread(target=send) for _ in range(64)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: sum(answer.outcome == "right" for answer in list(answers)) >= ENOUGH)
    finally:
        seconds = time.monotonic() - began
        enough.set()
        for thread in threads:
            thread.join()
    accepted = sorted(answer.took_s for answer in answers if answer.outcome == "right")
    refusals = {answer.error for answer in answers if answer.outcome == "error"}
    assert refusals
    assert all("UNAVAILABLE" in error and "Exceeds maximum queue size" in error for error in refusals), refusals
    assert not [answer for answer in answers if answer.outcome == "wrong"]
    p99, rate = accepted[int(0.99 * len(accepted)) - 1], ENOUGH / seconds
    assert p99 < 3 * (QUEUE + INSTANCES) / rate + 0.3
