"""Where a service begins to be overloaded, from its latencies at several rates."""

from __future__ import annotations

from collections.abc import Sequence

from .answers import Summary

KEPT_UP = 0.95
"""Share of the requests that are due that has to be answered rightly for the service to keep up."""

SHARES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 1.0, 1.15)
"""Rates of a sweep, in terms of the throughput of a closed loop that is never idle."""


def keeps_up(found: Summary) -> bool:
    """Whether nearly all that was due was answered rightly, in the time of the measurement."""
    return found.offered is None or found.achieved >= KEPT_UP * found.due


def knee(curve: Sequence[Summary]) -> int | None:
    """The measurement with the most power, throughput over mean latency, of those that keep up; None where none does.

    Below it latency is bought with idle capacity, above it throughput with waiting (Kleinrock, "Power and Deterministic
    Rules of Thumb for Probabilistic Problems in Computer Communications", ICC 1979).
    """
    steady = [index for index, found in enumerate(curve) if keeps_up(found) and found.answered]
    return max(steady, key=lambda index: curve[index].achieved / curve[index].mean_ms, default=None)


def within(curve: Sequence[Summary], p99_ms: float) -> int | None:
    """The measurement of the highest rate that keeps up with a p99 within the limit; None where none does."""
    fine = [index for index, found in enumerate(curve) if keeps_up(found) and found.p(99.0) <= p99_ms]
    return max(fine, key=lambda index: curve[index].achieved, default=None)
