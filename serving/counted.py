"""What a draft brings, as counters among the metrics of the server."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..compiler.generation.speculative import Speculation

COUNTERS = {
    "proposed": "Tokens that the draft proposed",
    "accepted": "Proposed tokens that the engine found too",
    "calls": "Calls of the engine that checked a draft",
    "tokens": "New tokens of the calls that checked a draft",
}
"""Fields of `Speculation`; the metrics are enginesmith_draft_<name>."""


class Counted:
    """Brings the counters of a model up to date.

    Args:
        backend: the module of Triton's Python backend.
    """

    def __init__(self, backend: Any, model: str, counts: Speculation) -> None:
        self._counts = counts
        self._seen = Speculation()
        kind = backend.MetricFamily.COUNTER
        self._families = {  # a metric ends with its family
            name: backend.MetricFamily(name=f"enginesmith_draft_{name}", description=text, kind=kind)
            for name, text in COUNTERS.items()
        }
        self._metrics = {name: family.Metric(labels={"model": model}) for name, family in self._families.items()}

    def __call__(self) -> None:
        """Adds what came since the last call."""
        now = dataclasses.replace(self._counts)
        for name, metric in self._metrics.items():
            metric.increment(getattr(now, name) - getattr(self._seen, name))
        self._seen = now
