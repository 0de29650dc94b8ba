"""What came of the requests of one measurement: latencies, percentiles with their intervals, errors."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
Z = 1.96
"""Of the 95 % interval."""

RIGHT, WRONG = "right", "wrong"


@dataclasses.dataclass(frozen=True)
class Answer:
    """One request. Times are seconds from the start of the measurement.

    Attributes:
        due: when it was to be sent. In an open loop its latency counts from here, so that a server that stalls, and a
            client that is late because of it, do not hide what users would have waited.
        sent: when it was.
        done: when its answer was there.
        outcome: `RIGHT`, `WRONG`, or the name of gRPC's status.
    """

    due: float
    sent: float
    done: float
    outcome: str

    @property
    def latency_ms(self) -> float:
        """From when it was due until it was answered."""
        return (self.done - self.due) * 1e3


@dataclasses.dataclass(frozen=True)
class Percentile:
    """A percentile in ms with its 95 % interval; `high` is None where too few lie beyond it to tell."""

    percent: float
    ms: float
    low: float
    high: float | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """A measurement of `seconds`.

    Attributes:
        offered: requests a second that were to be sent on average; None in a closed loop.
        due: requests a second that were due; random arrivals are not exactly so many.
        achieved: right answers a second.
        late_ms: p99 of how long after they were due requests were sent: a client that is behind.
        errors: how many requests had each outcome that is not right.
    """

    seconds: float
    offered: float | None
    due: float
    achieved: float
    answered: int
    mean_ms: float
    percentiles: tuple[Percentile, ...]
    late_ms: float
    errors: Mapping[str, int]

    def p(self, percent: float) -> float:
        """A percentile in ms; infinite where nothing was answered."""
        return next((found.ms for found in self.percentiles if found.percent == percent), math.inf)


def summarize(answers: Sequence[Answer], start: float, end: float, offered: float | None) -> Summary:
    """Of the requests that were due between `start` and `end`; what is before is warm-up."""
    counted = [answer for answer in answers if start <= answer.due < end]
    right = sorted(answer.latency_ms for answer in counted if answer.outcome == RIGHT)
    done = sum(answer.outcome == RIGHT and start <= answer.done < end for answer in answers)
    late = sorted((answer.sent - answer.due) * 1e3 for answer in counted)
    return Summary(
        seconds=end - start,
        offered=offered,
        due=len(counted) / (end - start),
        achieved=done / (end - start),
        answered=len(right),
        mean_ms=math.fsum(right) / len(right) if right else math.inf,
        percentiles=tuple(percentile(right, percent) for percent in PERCENTILES) if right else (),
        late_ms=_at(late, 0.99) if late else 0.0,
        errors=dict(collections.Counter(a.outcome for a in counted if a.outcome != RIGHT).most_common()),
    )


def percentile(ordered: Sequence[float], percent: float) -> Percentile:
    """A percentile of values in order, and the interval between two of them that covers it.

    The number of values below the true percentile is binomial, so that the values of ranks n q ± 1.96 sqrt(n q (1 - q))
    are bounds whatever the distribution (Conover, "Practical Nonparametric Statistics", 3rd edition, section 3.2). They
    take answers as independent; those that waited in one queue are not, and the true interval is wider.
    """
    count, share = len(ordered), percent / 100
    spread = Z * math.sqrt(count * share * (1 - share))
    low, high = math.floor(count * share - spread), math.ceil(count * share + spread)
    return Percentile(percent, _at(ordered, share), ordered[max(low, 0)], ordered[high] if high < count else None)


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(math.ceil(len(ordered) * share), len(ordered)) - 1]
