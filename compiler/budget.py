"""How far a less precise graph may be from its reference, and measuring how far it is.

    relative_l2=0.01    max_abs=0.02      at most that, on the worst sample and output
    cosine=0.999        snr_db=30         at least that, on the worst sample and output
    top1=0.995          top5=0.999        at least that share of rows with the reference's best class
    metric=0.003                          the user's metric at most that much below the reference's, in the mean

The measures are those of `validation.metrics`. NaN or Inf that the reference has not breaks every budget, and so do
integers that differ, but where the budget is on agreement.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..errors import RecipeError, UnknownNameError
from .validation.metrics import TOLERANCES, compare

Arrays = Mapping[str, np.ndarray]
MetricFunction = Callable[[Arrays, Arrays], Any]

_AT_MOST = ("relative_l2", "max_abs", "metric")
_AT_LEAST = ("cosine", "snr_db")
_AGREEMENT = ("top1", "top5")
_KINDS = (*_AT_MOST, *_AT_LEAST, *_AGREEMENT)
_SHARE_OF_TOLERANCE = 0.5


@dataclasses.dataclass(frozen=True)
class Budget:
    """A bound on one measure; its text form is ``kind=bound``.

    Attributes:
        metric: the user's metric, higher is better, which `kind` "metric" needs.
    """

    kind: str
    bound: float
    metric: MetricFunction | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise UnknownNameError("budget", self.kind, _KINDS)
        limit = 1.0 if self.kind in ("cosine", *_AGREEMENT) else math.inf
        if not (math.isfinite(self.bound) and 0 <= self.bound <= limit):
            expected = "a share between 0 and 1" if limit == 1 else "a number of at least 0"
            raise RecipeError(f"budget {self.kind!r} has a bound that cannot be", expected=expected, found=self.bound)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads ``kind=bound``.

        Raises:
            RecipeError: the text has another form, or the bound cannot be.
            UnknownNameError: no measure of that name.
        """
        kind, equals, bound = (part.strip() for part in text.partition("="))
        try:
            number = float(bound)
        except ValueError:
            number = None
        if not equals or number is None:
            raise RecipeError(f"budget {text!r} cannot be read", expected="for instance relative_l2=0.01 or top1=0.995")
        return cls(kind, number)

    @classmethod
    def default(cls, precision: str) -> Budget:
        """Half of the relative L2 that validation allows: it is spent on few samples, and judged on all."""
        return cls("relative_l2", TOLERANCES[precision]["relative_l2"] * _SHARE_OF_TOLERANCE)

    def __str__(self) -> str:
        return f"{self.kind}={self.bound:g}"

    def holds(self, value: float) -> bool:
        """Whether a measured value is inside; NaN never is."""
        return value <= self.bound if self.kind in _AT_MOST else value >= self.bound


class Meter:
    """Measures outputs against the reference's, sample by sample; nothing of a sample is kept.

    Attributes:
        broken: what breaks any budget, in words; empty where nothing does.

    Raises:
        RecipeError: a budget on the user's metric, and there is no metric.
    """

    def __init__(self, budget: Budget) -> None:
        if budget.kind == "metric" and budget.metric is None:
            raise RecipeError(
                "the budget is on the metric, and there is none",
                hint="give a metric, for instance metric.py:accuracy, or perplexity of a language model",
            )
        self.budget = budget
        self.broken = ""
        self._squares: dict[str, list[float]] = {}
        self._worst: list[float] = []
        self._rows = 0
        self._agreeing = 0
        self._scores: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])

    def add(self, reference: Arrays, outputs: Arrays, sample: Arrays) -> None:
        """Takes in one sample: what the reference gave, what was found, and the inputs with their labels."""
        for name, expected in reference.items():
            self._add_output(name, expected, np.asarray(outputs[name]))
        if self.budget.kind == "metric" and self.budget.metric is not None:
            for scores, arrays in zip(self._scores, (reference, outputs), strict=True):
                scores.append(np.atleast_1d(np.asarray(self.budget.metric(arrays, sample), np.float64)))

    def _add_output(self, name: str, expected: np.ndarray, found: np.ndarray) -> None:
        difference = compare(expected, found)
        agreement = self.budget.kind in _AGREEMENT
        if agreement and expected.dtype.kind in "biu" and expected.shape == found.shape:
            self._rows += expected.size
            self._agreeing += int(np.count_nonzero(expected == found))
            return
        if difference.problem or difference.nan or difference.inf:
            self.broken = f"output {name!r}: {difference.problem or 'NaN or Inf where the reference has none'}"
            return
        if difference.relative_l2 is not None:
            self._squares.setdefault(name, []).append(difference.relative_l2**2)
        if agreement:
            few = self.budget.kind == "top5" and difference.top5 is None  # five classes at most: all rows agree
            self._rows += difference.rows
            self._agreeing += difference.rows if few else getattr(difference, self.budget.kind)
        elif self.budget.kind != "metric" and (value := getattr(difference, self.budget.kind)) is not None:
            self._worst.append(value)

    @property
    def error(self) -> float:
        """Root of the mean over samples of the squared relative L2, of the worst output; infinite where broken."""
        if self.broken:
            return math.inf
        return max((math.sqrt(sum(squares) / len(squares)) for squares in self._squares.values()), default=0.0)

    @property
    def value(self) -> float:
        """What the budget bounds; NaN where broken.

        Raises:
            RecipeError: a budget on agreement, and no output is class scores or integers; the metric is not finite on
                the reference's own outputs.
        """
        kind = self.budget.kind
        if self.broken:
            return math.nan
        if kind == "metric":
            return self._lost()
        if kind in _AGREEMENT:
            if not self._rows:
                raise RecipeError(
                    f"the budget {self.budget} needs class scores, and no output holds any",
                    expected="an output of shape (rows, classes)",
                    hint="give a budget on relative_l2",
                )
            return self._agreeing / self._rows
        if kind in _AT_LEAST:
            return min(self._worst, default=1.0 if kind == "cosine" else math.inf)
        return max(self._worst, default=0.0)

    @property
    def holds(self) -> bool:
        """Whether the budget holds."""
        return self.budget.holds(self.value)

    def _lost(self) -> float:
        expected, found = (np.concatenate(scores) for scores in self._scores)
        if not np.isfinite(expected).all():
            raise RecipeError("the metric is not finite on the reference's own outputs")
        return float(expected.mean() - found.mean())
