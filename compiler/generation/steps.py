"""The calls of one generation, on whatever runner: in place where it can, else with caches that go in and out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ...targets.base import Arrays, Runner
from ..signature import Signature
from ..states import LOGITS, asked_for, call, empty_caches, numbers
from .sampling import Sampling


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

    def empty_caches(self, batch: int) -> Any:
        """Caches for so many rows that hold nothing yet, by name: arrays, or what is cut and copied like them."""

    def steps(self, batch: int, caches: Any = None) -> Steps:
        """Calls for so many rows, with empty caches, or with those that are given."""


@runtime_checkable
class Choosing(Protocol):
    """Calls whose tokens are chosen where the logits lie."""

    def tokens(
        self, past: np.ndarray, limit: int, sampling: Sampling | None = None, draws: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The next tokens (batch), `limit` times at most, and the largest logit (batch) of each choice.

        Args:
            past: tokens of each row that the caches hold after the last call, by whose logits the first is chosen.
            draws: (limit, batch), numbers from 0 up to 1 to draw by, beside `sampling`.
        """

    def token(
        self, last: np.ndarray, past: np.ndarray, samplings: Sequence[Sampling | None], chance: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """One call with the last token (batch) of each row: the tokens (batch) that follow, and the largest logits.

        Args:
            past: tokens of each row that the caches hold before.
            samplings: of each row; None for the likeliest token.
            chance: (batch), numbers from 0 up to 1 to draw by; 0 for the likeliest token.
        """


@runtime_checkable
class Finding(Protocol):
    """Calls whose likeliest tokens are found where the logits lie."""

    def likeliest(
        self, ids: np.ndarray, past: np.ndarray, count: np.ndarray, back: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """One call, as of `Steps`: the likeliest tokens (batch), or (batch, kept) with `back`, and the largest logits.

        The largest logit is not finite where one of them is no number.
        """


def likeliest(
    steps: Steps, ids: np.ndarray, past: np.ndarray, count: np.ndarray, back: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """As of `Finding`, on whatever steps."""
    if isinstance(steps, Finding):
        return steps.likeliest(ids, past, count, back)
    logits = steps(ids, past, count, back)
    tokens = logits.argmax(axis=-1)  # NaN is the largest to argmax
    return tokens, np.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]


def caches_of(runner: Runner, signature: Signature, batch: int) -> Any:
    """Caches for so many rows that hold nothing yet, where the runner has them."""
    return runner.empty_caches(batch) if isinstance(runner, Stepping) else empty_caches(signature, batch)


def steps_of(runner: Runner, signature: Signature, batch: int, caches: Any = None) -> Steps:
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
