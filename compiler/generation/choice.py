"""Chooses the tokens of one row, which has random numbers of its own, whatever rows are beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...errors import EngineError
from .sampling import Sampling

Stream = Callable[[int, int], Any]
"""Takes the number of a row and its next token, as soon as it is known."""


class Choice:
    """The next token of a row, time after time.

    Args:
        sampling: how it is drawn; None for the likeliest always.
        seed: of what is drawn: a number, or one with the number of the row.
    """

    def __init__(self, sampling: Sampling | None, seed: int | tuple[int, int] = 0, *, row: int = 0) -> None:
        self._sampling = sampling
        self._generator = np.random.default_rng(seed)
        self._row = row
        self._step = 0

    @property
    def greedy(self) -> bool:
        """Whether it takes the likeliest always."""
        return self._sampling is None

    def __call__(self, logits: np.ndarray) -> int:
        """A token by its logits (vocabulary).

        Raises:
            EngineError: they are no numbers.
        """
        self._step += 1
        best = likeliest(logits, f"for row {self._row} at token {self._step}")
        return best if self._sampling is None else self._sampling.draw(logits, self._generator)


def likeliest(logits: np.ndarray, where: str) -> int:
    """The token with the largest logit (vocabulary).

    Raises:
        EngineError: they are no numbers, `where` they are given.
    """
    best = int(logits.argmax())
    if not np.isfinite(logits[best]):  # NaN is the largest to argmax
        raise no_numbers(where, logits[best])
    return best


def no_numbers(where: str, found: np.floating[Any]) -> EngineError:
    """What is wrong where the largest logit is not finite."""
    return EngineError(
        f"the engine gives logits that are no numbers, {where}",
        expected="finite numbers",
        found=float(found),
        hint="validate the engine; `enginesmith debug` finds the node",
    )
