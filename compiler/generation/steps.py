"""The calls of one generation, on whatever runner: in place where it can, else with caches that go in and out."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from ...targets.base import Runner
from ..signature import Signature
from ..states import COUNT, IDS, LOGITS, PAST, empty_caches


class Steps(Protocol):
    """Calls one after the other on the same caches."""

    def __call__(self, ids: np.ndarray, past: np.ndarray, count: np.ndarray) -> np.ndarray:
        """The logits (batch, vocabulary) that follow; valid until the next call."""


@runtime_checkable
class Stepping(Protocol):
    """A runner that keeps caches itself."""

    def steps(self, batch: int) -> Steps:
        """Calls for so many rows, with empty caches."""


def steps_of(runner: Runner, signature: Signature, batch: int) -> Steps:
    """Calls for so many rows, with empty caches."""
    return runner.steps(batch) if isinstance(runner, Stepping) else _Copying(runner, signature, batch)


class _Copying:
    """Gives the caches that a call returned to the next one."""

    def __init__(self, runner: Runner, signature: Signature, batch: int) -> None:
        self._runner = runner
        self._states = signature.states
        self._caches = empty_caches(signature, batch)

    def __call__(self, ids: np.ndarray, past: np.ndarray, count: np.ndarray) -> np.ndarray:
        outputs = self._runner.run({IDS: ids, PAST: past, COUNT: count, **self._caches})
        self._caches = {name: outputs[output] for name, output in self._states.items()}
        return np.asarray(outputs[LOGITS])
