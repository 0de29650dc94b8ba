"""Samples for calibration, validation and benchmarks, read as a stream and checked against the signature."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np


class Samples(Protocol):
    """Inputs that can be iterated any number of times, one batch in memory at a time.

    Attributes:
        description: where they come from, for people.
        random: whether they were made up because the user gave none.
    """

    description: str
    random: bool

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields inputs by name."""
