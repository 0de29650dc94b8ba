"""Intervals of measured ratios, by seeded bootstrap. Needs NumPy only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from ..manifest import SpeedUp

RESAMPLES = 2000
CONFIDENCE = 0.95


def speed_up(against: str, baseline_ms: Sequence[float], candidate_ms: Sequence[float], seed: int) -> SpeedUp:
    """How many times faster the candidate is, from the median times of the rounds that both were in.

    With d_i = log(baseline_ms[i] / candidate_ms[i]) for round i, the ratio is exp(median d) and its interval is that
    of the median of d over bootstrap resamples of the rounds. Pairing within a round cancels what slows the whole
    machine for seconds, logarithms make A over B the inverse of B over A, and the median ignores the rounds that a
    neighbour spoilt. Percentiles of a bootstrap are too narrow for a few rounds, so they are taken further out, at
    the level Phi(-sqrt(n / (n - 1)) t), t being Student's quantile with n - 1 degrees of freedom (Hesterberg, "What
    Teachers Should Know about the Bootstrap", 2015, section 3.4).
    """
    logs = np.log(np.asarray(baseline_ms) / np.asarray(candidate_ms))
    count = len(logs)
    picks = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    tail = statistics.NormalDist().cdf(-((count / (count - 1)) ** 0.5) * student_quantile(count - 1))
    low, high = np.quantile(np.median(logs[picks], axis=1), [tail, 1 - tail])
    ratio = float(np.exp(np.median(logs)))
    return SpeedUp(against=against, ratio=ratio, low=float(np.exp(low)), high=float(np.exp(high)))


def student_quantile(degrees: int) -> float:
    """Upper 97.5 % quantile of Student's t, within 1 % from 3 degrees of freedom (Abramowitz and Stegun 26.7.5)."""
    z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return math.fsum(term / degrees**power for power, term in enumerate(terms))
