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

    Attributes:
        sampling: as given.
    """

    def __init__(self, sampling: Sampling | None, seed: int | tuple[int, int] = 0, *, row: int = 0) -> None:
        self.sampling = sampling
        self._generator = np.random.default_rng(seed)
        self._row = row
        self._step = 0

    @property
    def greedy(self) -> bool:
        """Whether it takes the likeliest always."""
        return self.sampling is None

    def __call__(self, logits: np.ndarray) -> int:
        """A token by its logits (vocabulary).

        Raises:
            EngineError: they are no numbers.
        """
        best = int(logits.argmax())
        self.check(logits[best])  # NaN is the largest to argmax
        return best if self.sampling is None else self.sampling.draw(logits, self._generator)

    def check(self, best: np.floating[Any]) -> None:
        """Looks at the largest logit of the next token, which is not a number where one of them is none.

        Raises:
            EngineError: it is not finite.
        """
        self._step += 1
        check_number(best, self._where)

    @property
    def _where(self) -> str:
        return f"for row {self._row} at token {self._step}"

    def chance(self) -> float:
        """The random number from 0 up to 1 by which its next token is drawn; 0 where it takes the likeliest."""
        return 0.0 if self.greedy else float(self._generator.random())

    def draws(self, count: int) -> np.ndarray:
        """The random numbers (count) from 0 up to 1 by which its next tokens are drawn."""
        return self._generator.random(count)


def check_number(best: np.floating[Any], where: str) -> None:
    """Looks at the largest of some logits.

    Raises:
        EngineError: it is not finite, `where` the logits are given.
    """
    if not np.isfinite(best):
        raise EngineError(
            f"the engine gives logits that are no numbers, {where}",
            expected="finite numbers",
            found=float(best),
            hint="validate the engine; `enginesmith debug` finds the node",
        )
