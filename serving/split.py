"""Several bundles of one model side by side: every call goes to one of them, by shares, and each is counted.

old, new = enginesmith.Client("10.0.0.1:8001", "digits"), enginesmith.Client("10.0.0.2:8001", "digits")
with enginesmith.Split({"old": (old, 0.9), "new": (new, 0.1)}) as split:
    outputs, arm = split(image=array, key="user-17")
    print(split.results()["new"])
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import math
import random
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import EnginesmithError, UsageError
from .client import SUBMITTED, Client
from .load.answers import Percentile, percentile

KEPT = 10_000
"""Latencies that are kept of each arm, the latest."""

PERCENTILES = (50.0, 90.0, 99.0)


class Answered(NamedTuple):
    """Outputs by name, and the arm that they come from."""

    outputs: dict[str, np.ndarray]
    arm: str


@dataclasses.dataclass(frozen=True)
class ArmResults:
    """What came of the calls of one arm.

    Attributes:
        share: of the calls that it is to get.
        errors: how many calls failed, by the name of the error's class.
        percentiles: of the latencies of the calls that were answered, retries included, with 95 % intervals; none
            before the first answer.
    """

    share: float
    calls: int
    errors: Mapping[str, int]
    percentiles: tuple[Percentile, ...]

    def __str__(self) -> str:
        failed = ", ".join(f"{count} {name}" for name, count in self.errors.items())
        times = ", ".join(f"p{found.percent:g} {found.ms:.3g} ms" for found in self.percentiles)
        return f"{self.calls:,} calls, {failed or 'no errors'}{times and ', '}{times}"


class _Arm:
    """A client, and what came of its calls."""

    def __init__(self, client: Client, share: float) -> None:
        self.client, self.share = client, share
        self.calls = 0
        self.errors: collections.Counter[str] = collections.Counter()
        self.latencies_ms: collections.deque[float] = collections.deque(maxlen=KEPT)


class Split:
    """Sends each call to one of several arms. Calls may come from several threads.

    A call that fails is not sent to another arm: its errors are part of what is compared.

    Args:
        arms: a client and its share, by the name of the arm; shares are relative to their sum. The clients are closed
            with the split.
        experiment: for keys. The same key gets the same arm in every process and on every machine, as long as this name
            and the shares stay; under another name it is drawn anew. Where the last arm gets a greater share, it keeps
            the keys that it had.
        seed: of the draw for calls without a key.

    Raises:
        UsageError: no arms, or shares that are none.
    """

    def __init__(
        self, arms: Mapping[str, tuple[Client, float]], *, experiment: str = "", seed: int | None = None
    ) -> None:
        shares = {name: share for name, (_, share) in arms.items()}
        total = math.fsum(shares.values())
        if any(not 0 <= share < math.inf for share in shares.values()) or not total > 0:
            raise UsageError(
                "the shares of the arms make no sense", expected="numbers from 0, one above it at least", found=shares
            )
        self._arms = {name: _Arm(client, share / total) for name, (client, share) in arms.items()}
        self._ends = list(itertools.accumulate(arm.share for arm in self._arms.values()))
        self._experiment, self._random = experiment, random.Random(seed)
        self._lock = threading.Lock()
        self._pool = concurrent.futures.ThreadPoolExecutor(SUBMITTED, "enginesmith-split")

    def __call__(
        self,
        inputs: Mapping[str, np.ndarray] | None = None,
        /,
        *,
        key: str | int | None = None,
        **options: Any,
    ) -> Answered:
        """Outputs of inputs, and the arm that they come from.

        Args:
            key: of who calls, as a user or a session: the same key always gets the same arm. Drawn where None.
            options: inputs by name, and what a call of `Client` takes.

        Raises:
            DataError, EngineError: as a call of `Client`.
        """
        name = self.arm(key)
        arm, began = self._arms[name], time.perf_counter()
        try:
            outputs = arm.client(inputs, **options)
        except EnginesmithError as error:
            with self._lock:
                arm.calls += 1
                arm.errors[type(error).__name__] += 1
            raise
        with self._lock:
            arm.calls += 1
            arm.latencies_ms.append((time.perf_counter() - began) * 1e3)
        return Answered(outputs, name)

    def submit(self, inputs: Mapping[str, np.ndarray], **options: Any) -> concurrent.futures.Future[Answered]:
        """Starts a call; its future has what the call gives, or the error."""
        return self._pool.submit(self.__call__, inputs, **options)

    def arm(self, key: str | int | None = None) -> str:
        """The arm of a key; for None one is drawn."""
        at = self._random.random() if key is None else _place(self._experiment, key)
        return next((name for name, end in zip(self._arms, self._ends, strict=True) if at < end), self._last)

    def results(self) -> dict[str, ArmResults]:
        """What came of all calls until now, by arm."""
        with self._lock:
            return {name: _results(arm) for name, arm in self._arms.items()}

    def close(self) -> None:
        """Waits for what was submitted, and closes the clients."""
        self._pool.shutdown()
        for arm in self._arms.values():
            arm.client.close()

    def __enter__(self) -> Split:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def _last(self) -> str:
        """The last arm with a share: shares that are rounded may sum up to a little less than 1."""
        return [name for name, arm in self._arms.items() if arm.share][-1]


def _place(experiment: str, key: str | int) -> float:
    """Where a key stands between 0 and 1, the same everywhere: Python's own hash is another in every process."""
    digest = hashlib.sha256(f"{experiment}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _results(arm: _Arm) -> ArmResults:
    ordered = sorted(arm.latencies_ms)
    found = tuple(percentile(ordered, percent) for percent in PERCENTILES) if ordered else ()
    return ArmResults(arm.share, arm.calls, dict(arm.errors), found)
