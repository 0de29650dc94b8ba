"""The calls of one generation, on whatever runner: in place where it can, else with caches that go in and out."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from ...targets.base import Arrays, Runner
from ..signature import Signature
from ..states import COUNT, IDS, LOGITS, PAST, empty_caches


class Steps(Protocol):
    """Calls one after the other on the same caches."""

    def __call__(self, ids: np.ndarray, past: np.ndarray, count: np.ndarray) -> np.ndarray:
        """The logits (batch, vocabulary) that follow; valid until the next call."""


@runtime_checkable
class Stepping(Protocol):
    """A runner that keeps caches itself."""

    def steps(self, batch: int, caches: Arrays | None = None) -> Steps:
        """Calls for so many rows, with empty caches, or with those that are given."""


def steps_of(runner: Runner, signature: Signature, batch: int, caches: Arrays | None = None) -> Steps:
    """Calls for so many rows, with empty caches, or with those that are given and then hold what the calls make."""
    if isinstance(runner, Stepping):
        return runner.steps(batch, caches)
    return _Copying(runner, signature, caches or empty_caches(signature, batch))


class _Copying:
    """Gives caches to each call, and copies what comes back into them."""

    def __init__(self, runner: Runner, signature: Signature, caches: Arrays) -> None:
        self._runner = runner
        self._states = signature.states
        self._caches = caches

    def __call__(self, ids: np.ndarray, past: np.ndarray, count: np.ndarray) -> np.ndarray:
        outputs = self._runner.run({IDS: ids, PAST: past, COUNT: count, **self._caches})
        for name, output in self._states.items():
            self._caches[name][...] = outputs[output]
        return np.asarray(outputs[LOGITS])
