"""What sparse attention costs, on texts: how much less likely the model finds the tokens that follow.

    change = mean of ln p_sparse(token) - ln p_dense(token)         perplexity grows by exp(-change)

A decoder gives the logits behind the last token of a call alone, so a text is cut at several places, and the token
behind each is held out. Only tokens that have more before them than sparse attention sees are asked for: the others
would say that nothing changes. Where no token follows, the logits are compared.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np

from ..data import Samples
from ..difference import relative_l2
from ..generation.likelihood import log_probabilities
from ..graph import Graph
from ..graph.probe import Session
from ..states import COUNT, IDS, LOGITS, PAST, asked_for

CUTS = (1.0, 0.75, 0.5, 0.25)
"""Where texts are cut, as shares of what lies behind the keys that sparse attention sees."""


@dataclasses.dataclass(frozen=True)
class Error:
    """How far a graph is from dense attention.

    Attributes:
        tokens: how many were held out.
        change: of the mean ln p of these; None where there are none.
        deviation: the standard error of that mean.
        relative_l2: of the logits.
    """

    tokens: int
    change: float | None
    deviation: float
    relative_l2: float

    @property
    def value(self) -> float:
        """What a budget bounds: the size of the change and its standard error, so that few tokens do not pass by
        chance; the relative L2 where no token is held out. Infinite for what is no number.
        """
        found = self.relative_l2 if self.change is None else abs(self.change) + self.deviation
        return found if math.isfinite(found) else math.inf

    def record(self) -> dict[str, float | int | None]:
        """As JSON; numbers that are not finite are None."""
        values = {"error": self.value, "change": self.change, "relative_l2": self.relative_l2}
        finite = {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
        return {**finite, "tokens": self.tokens}


def longest(samples: Samples) -> int:
    """Tokens of the longest text, those in caches with it."""
    return max(int((batch[PAST] + batch[COUNT]).max()) for batch in samples)


class Judge:
    """Measures graphs against one; the data are read again each time, so that no caches stay in memory.

    Args:
        beyond: keys that sparse attention sees at most.
        calls: of the model, at most.

    Raises:
        GraphError: ONNX Runtime refuses the graph.
        TargetUnavailableError: ONNX Runtime is not installed.
    """

    def __init__(self, dense: Graph, samples: Samples, beyond: int, calls: int) -> None:
        self._samples, self._beyond, self._calls = samples, beyond, calls
        self._expected = list(self._run(dense))

    @property
    def calls(self) -> int:
        """How often the model is run for one measurement."""
        return len(self._expected)

    def measure(self, graph: Graph) -> Error:
        """How far a graph is from the dense one.

        Raises:
            GraphError: ONNX Runtime refuses it.
        """
        found = list(self._run(graph))
        changes = np.concatenate([a.likelihoods - b.likelihoods for a, b in zip(found, self._expected, strict=True)])
        logits, expected = (np.concatenate([one.logits for one in run]) for run in (found, self._expected))
        error = relative_l2(logits, expected)
        if not len(changes):
            return Error(0, None, 0.0, error)
        deviation = float(changes.std(ddof=1)) / math.sqrt(len(changes)) if len(changes) > 1 else 0.0
        return Error(len(changes), float(changes.mean()), deviation, error)

    def _run(self, graph: Graph) -> Iterator[_Logits]:
        session = Session(graph, optimized=True)
        place = graph.output_names.index(LOGITS)
        for inputs, rows in itertools.islice(self._cut(), self._calls):
            logits = session({name: inputs[name] for name in graph.input_names})[place]
            yield _logits(inputs, rows, asked_for(logits, None))

    def _cut(self) -> Iterator[tuple[Mapping[str, np.ndarray], np.ndarray]]:
        """Calls, and which of their rows count."""
        for number, share in enumerate(CUTS):
            for batch in self._samples:
                past, count = batch[PAST].astype(np.int64), batch[COUNT].astype(np.int64)
                counts = self._counts(past, count, share)
                rows = past + counts > self._beyond
                if number:  # short texts are cut where they were before
                    rows &= counts < self._counts(past, count, CUTS[number - 1])
                if rows.any():
                    yield {**batch, COUNT: counts.astype(batch[COUNT].dtype), "behind": counts < count}, rows

    def _counts(self, past: np.ndarray, count: np.ndarray, share: float) -> np.ndarray:
        """How many tokens of each row stand before a cut."""
        most, least = np.maximum(count - 1, 1), np.maximum(self._beyond - past, 0)
        counts = least + np.ceil((most - least) * share).astype(np.int64)
        return np.asarray(np.minimum(np.maximum(counts, 1), most))


@dataclasses.dataclass(frozen=True)
class _Logits:
    """Logits of rows, and ln p of the tokens that follow those that something follows."""

    logits: np.ndarray
    likelihoods: np.ndarray


def _logits(inputs: Mapping[str, np.ndarray], rows: np.ndarray, logits: np.ndarray) -> _Logits:
    followed = np.flatnonzero(rows & inputs["behind"])
    tokens = inputs[IDS][followed, inputs[COUNT][followed]]
    return _Logits(logits[rows], log_probabilities(logits[followed], tokens))
