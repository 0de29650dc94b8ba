"""Chooses the next token from logits: the most likely, or by chance among the likely ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ...errors import RecipeError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Those that are left out get a score of minus infinity, so that they are never drawn.

    Attributes:
        temperature: the logits are divided by it; below 1 likely tokens become more likely.
        top_k: so many of the likeliest tokens stay.
        top_p: of the likeliest tokens so many stay that together they have at least this probability.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise RecipeError(
                "temperature is out of range", expected="above 0", found=self.temperature,
                hint="leave sampling out to get the most likely token always",
            )  # fmt: skip
        if self.top_k is not None and self.top_k < 1:
            raise RecipeError("top_k is out of range", expected="1 or more", found=self.top_k)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise RecipeError("top_p is out of range", expected="above 0, up to 1", found=self.top_p)

    @property
    def limited(self) -> bool:
        """Whether tokens may be left out."""
        return self.top_k is not None or self.top_p not in (None, 1)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Of one row of logits, in float64."""
        scores = logits.astype(np.float64) / self.temperature
        if self.top_k is not None and self.top_k < len(scores):
            least = np.partition(scores, -self.top_k)[-self.top_k]
            scores = np.where(scores < least, -np.inf, scores)
        if self.top_p is not None and self.top_p < 1:
            order = np.argsort(-scores, kind="stable")
            sums = np.cumsum(_softmax(scores[order]))
            scores[order[1:][sums[:-1] >= self.top_p]] = -np.inf  # the likeliest stays, whatever its probability
        return _softmax(scores)

    def draw(self, logits: np.ndarray, generator: np.random.Generator) -> int:
        """One token of a row of logits."""
        sums = np.cumsum(self.probabilities(logits))
        return int(np.searchsorted(sums, generator.random() * sums[-1], side="right"))


GREEDY, DRAW, AMONG = "greedy", "draw", "draw-among"
"""How the tokens of some rows are chosen in one go: the likeliest, drawn among all, or drawn among some."""


def kind_of(samplings: Sequence[Sampling | None]) -> str:
    """One of these kinds, which serves all of the rows."""
    if not any(samplings):
        return GREEDY
    return AMONG if any(sampling is None or sampling.limited for sampling in samplings) else DRAW


def options_of(samplings: Sequence[Sampling | None], vocabulary: int) -> dict[str, np.ndarray]:
    """The options (batch) of rows by name, where the tokens of all are drawn in one go.

    A row without sampling draws among its likeliest token and its equals. By the number 0 the first of them comes,
    which is the likeliest token. Without `top_k` all of the vocabulary stays; without `top_p` it is more than sums that
    are rounded up.
    """
    rows = [sampling or Sampling(top_k=1) for sampling in samplings]
    return {
        "temperature": np.array([float(row.temperature) for row in rows]),
        "top_k": np.array([min(row.top_k or vocabulary, vocabulary) for row in rows], np.int64),
        "top_p": np.array([2.0 if row.top_p in (None, 1) else row.top_p for row in rows], np.float64),
    }


def sampling_of(
    *, do_sample: bool, temperature: float | None, top_k: int | None, top_p: float | None
) -> Sampling | None:
    """The sampling that a caller asks for; None for the most likely token always.

    Raises:
        RecipeError: a value out of range, or given without `do_sample`.
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    given = {name: value for name, value in options.items() if value is not None}
    if not do_sample:
        if given:
            raise RecipeError(
                f"{next(iter(given))} says how to sample, and sampling is off",
                expected="do_sample=True beside it",
                found="do_sample=False",
            )
        return None
    return Sampling(**given)  # type: ignore[arg-type]


def _softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max())
    return np.asarray(powers / powers.sum())
