"""Requests to a server from many threads, each answer compared with what NumPy makes of the same input."""

from __future__ import annotations

import collections
import runpy
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

_small = runpy.run_path(str(Path(__file__).parent / "small_bundles.py"))
network, W = _small["network"], _small["W"]


ON_ITS_WAY_S = 0.25
"""How long a request may take to reach the server where others use the processors."""
REFUSED = ("Server is stopping", "has no available versions")
"""What Triton says to requests that come while it ends."""


def infer_input(x: np.ndarray, name: str = "x", kind: str = "FP32") -> Any:
    return triton.InferInput(name, list(x.shape), kind).set_data_from_numpy(x)


@dataclass
class Answer:
    """One request: when it was sent, whether the answer was right, wrong, or what error came instead."""

    sent: float
    took_s: float
    outcome: str
    error: str = ""


@dataclass
class Load:
    """Sends requests of one to three rows until it is stopped.

    Attributes:
        weights: of the networks whose answers are right.
    """

    url: str
    model: str
    threads: int = 8
    pause_s: float = 0.0
    weights: Sequence[np.ndarray] = (W,)
    answers: list[Answer] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(n,), daemon=True) for n in range(self.threads)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in self._threads), "a request never came back"

    def _send(self, number: int) -> None:
        generator = np.random.default_rng(number)
        client = triton.InferenceServerClient(self.url, channel_args=[("grpc.use_local_subchannel_pool", 1)])
        while not self._stop.is_set():
            x = generator.standard_normal((generator.integers(1, 4), 4)).astype(np.float32)
            self.answers.append(ask(client, self.model, x, weights=self.weights))
            time.sleep(self.pause_s if self.answers[-1].outcome == "right" else 0.01)

    def wait_for(self, count: int, seconds: float = 60) -> None:
        """Waits until so many more answers are right."""
        count += self.count("right")
        deadline = time.monotonic() + seconds
        while self.count("right") < count:
            assert time.monotonic() < deadline, f"only {self.count('right')} of {count}: {self.errors()}"
            time.sleep(0.05)

    def count(self, outcome: str) -> int:
        return sum(answer.outcome == outcome for answer in list(self.answers))

    def unanswered(self, asked_at: float) -> list[Answer]:
        """Requests that were sent before the server was asked to end, and got no right answer.

        One that was sent just before may have come just after, and is refused then as every later one: Triton looks for
        the model before it takes a request, and does not find it once that is unloaded.
        """
        return [
            answer
            for answer in list(self.answers)
            if answer.sent < asked_at - 0.005
            and answer.outcome != "right"
            and not (any(text in answer.error for text in REFUSED) and answer.sent > asked_at - ON_ITS_WAY_S)
        ]

    def errors(self) -> dict[str, int]:
        return collections.Counter(a.error for a in list(self.answers) if a.outcome == "error")


def ask(client: Any, model: str, x: np.ndarray, timeout_s: float = 30, weights: Sequence[np.ndarray] = (W,)) -> Answer:
    sent = time.monotonic()
    try:
        result = client.infer(model, [infer_input(x)], client_timeout=timeout_s)
    except InferenceServerException as error:
        return Answer(sent, time.monotonic() - sent, "error", f"{error.status()}: {error.message()}")
    right = any(_same(result, network(x, w)) for w in weights)
    return Answer(sent, time.monotonic() - sent, "right" if right else "wrong")


def _same(result: Any, expected: Mapping[str, np.ndarray]) -> bool:
    return all(np.allclose(result.as_numpy(name), array, rtol=1e-4, atol=1e-5) for name, array in expected.items())
