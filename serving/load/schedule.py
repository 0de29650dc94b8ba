"""When requests are due in an open loop."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator


def arrivals(rate: float, seed: int, *, constant: bool = False) -> Iterator[float]:
    """Seconds from the start at which requests are due, `rate` a second on average, without end.

    As independent users send them, which is a Poisson process: gaps are exponential with mean 1/rate. Or evenly spaced.
    """
    if constant:
        return (number / rate for number in itertools.count())
    generator = random.Random(seed)
    return itertools.accumulate(generator.expovariate(rate) for _ in itertools.count())
