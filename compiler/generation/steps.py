"""The calls of one generation, on whatever runner: in place where it can, else with caches that go in and out."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from ...targets.base import Arrays, Runner
from ..signature import Signature
from ..states import LOGITS, asked_for, call, empty_caches, numbers


class Steps(Protocol):
    """Calls one after the other on the same caches."""

    def __call__(
        self,
        ids: np.ndarray,
        past: np.ndarray,
        count: np.ndarray,
        back: np.ndarray | None = None,
        position: np.ndarray | None = None,
    ) -> np.ndarray:
        """The logits (batch, vocabulary) that follow; valid until the next call.

        Args:
            back: of engines that take it; the logits are (batch, kept, vocabulary) then: what follows these tokens.
            position: tokens of each text before `ids`, where that is more than the `past` ones in the cache.
        """


@runtime_checkable
class Stepping(Protocol):
    """A runner that keeps caches itself."""

    def steps(self, batch: int, caches: Arrays | None = None) -> Steps:
        """Calls for so many rows, with empty caches, or with those that are given."""


def steps_of(runner: Runner, signature: Signature, batch: int, caches: Arrays | None = None) -> Steps:
    """Calls for so many rows, with empty caches, or with those that are given and then hold what the calls make."""
    if isinstance(runner, Stepping):
        return runner.steps(batch, caches)
    return _InAndOut(runner, signature, batch, caches)


class _InAndOut:
    """Gives the caches that a call returned to the next one; where others have them too, they are copied into those."""

    def __init__(self, runner: Runner, signature: Signature, batch: int, shared: Arrays | None) -> None:
        self._runner = runner
        self._states = signature.states
        self._numbers = numbers(signature)
        self._shared = shared
        self._caches = shared or empty_caches(signature, batch)

    def __call__(
        self,
        ids: np.ndarray,
        past: np.ndarray,
        count: np.ndarray,
        back: np.ndarray | None = None,
        position: np.ndarray | None = None,
    ) -> np.ndarray:
        given = call(self._numbers, ids, past, count, back, position)
        outputs = self._runner.run({**given, **self._caches})
        if self._shared is None:
            self._caches = {name: outputs[output] for name, output in self._states.items()}
        else:
            for name, output in self._states.items():
                self._shared[name][...] = outputs[output]
        return asked_for(np.asarray(outputs[LOGITS]), back)
