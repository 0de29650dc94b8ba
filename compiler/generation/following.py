"""The tokens that follow a prompt, call by call: chosen on the device where the runner can, else on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .choice import Choice
from .sampling import Sampling
from .steps import Choosing, Steps

Following = Callable[[Sequence[int]], np.ndarray]
"""Gives the next token of each row (batch), of which those count that go on; at first those that follow the prompts."""


def following(
    steps: Steps,
    logits: np.ndarray,
    counts: np.ndarray,
    choices: Sequence[Choice],
    sampling: Sampling | None,
    max_new_tokens: int,
) -> Following:
    """The tokens of rows whose prompts were read.

    Args:
        logits: (batch, vocabulary), of the call that read them.
        counts: (batch), tokens in the caches.
        choices: of each row.
        sampling: that of all choices.

    Raises:
        EngineError: a logit is no number; from the function that is given.
    """
    if not isinstance(steps, Choosing):
        return _OnHost(steps, logits, counts, choices)
    draws = None if sampling is None else np.stack([choice.draws(max_new_tokens) for choice in choices], axis=1)
    found = steps.tokens(counts, max_new_tokens, sampling, draws)

    def next_tokens(live: Sequence[int]) -> np.ndarray:
        tokens, best = next(found)
        for row in live:
            choices[row].check(best[row])
        return tokens

    return next_tokens


class _OnHost:
    """Chooses by logits that came to the host."""

    def __init__(self, steps: Steps, logits: np.ndarray, counts: np.ndarray, choices: Sequence[Choice]) -> None:
        self._steps, self._choices = steps, choices
        self._logits: np.ndarray | None = logits
        self._past, self._one = counts.copy(), np.ones_like(counts)
        self._last = np.zeros((len(counts), 1), np.int64)

    def __call__(self, live: Sequence[int]) -> np.ndarray:
        logits = self._logits
        if logits is None:
            logits = self._steps(self._last, self._past, self._one)
            self._past[live] += 1  # a row that has ended writes its last token again, where nothing reads it
        for row in live:
            self._last[row] = self._choices[row](logits[row])
        self._logits = None
        return self._last[:, 0]
