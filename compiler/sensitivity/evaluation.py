"""Runs variants of a graph against the graph itself, on a few batches of data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ..budget import Budget, Meter
from ..data import Samples
from ..graph import Graph, probe


class Evaluation:
    """Measures variants, one session at a time; memory holds the batches and what the reference makes of them.

    Args:
        batches: how many batches of the samples to run.
        on_run: takes the number of runs, as each begins.

    Attributes:
        runs: how many variants were run. Equal ones are run once, and those that equal the reference not at all.

    Raises:
        GraphError: ONNX Runtime refuses the reference.
        TargetUnavailableError: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        reference: Graph,
        samples: Samples,
        budget: Budget,
        *,
        batches: int,
        on_run: Callable[[int], None] = lambda runs: None,
    ) -> None:
        self.budget = budget
        self.runs = 0
        self._on_run = on_run
        self._names = reference.input_names
        self._outputs = reference.output_names
        self._samples = [dict(sample) for sample in itertools.islice(labelled(samples), batches)]
        self._reference = list(self._run(reference))
        self._known = {reference.fingerprint(): self._compared(self._reference)}

    @property
    def batches(self) -> int:
        """How many batches of data are measured on."""
        return len(self._samples)

    def measure(self, variant: Graph) -> Meter:
        """How far a variant is from the reference.

        Raises:
            GraphError: ONNX Runtime refuses the variant.
        """
        key = variant.fingerprint()
        if key not in self._known:
            self.runs += 1
            self._on_run(self.runs)
            self._known[key] = self._compared(self._run(variant))
        return self._known[key]

    def _compared(self, outputs: Iterable[dict[str, np.ndarray]]) -> Meter:
        meter = Meter(self.budget)
        for sample, expected, found in zip(self._samples, self._reference, outputs, strict=True):
            meter.add(expected, found, sample)
        return meter

    def _run(self, graph: Graph) -> Iterator[dict[str, np.ndarray]]:
        session = probe.Session(graph, optimized=True)
        for sample in self._samples:
            inputs = {name: sample[name] for name in self._names}
            yield dict(zip(self._outputs, session(inputs), strict=True))


def number(value: float) -> float | None:
    """As JSON takes it: None for NaN and infinity."""
    return value if math.isfinite(value) else None


def labelled(samples: Samples) -> Iterator[dict[str, Any]]:
    """Batches with what a metric reads beside the model's inputs, where the samples hold such."""
    read = getattr(samples, "labelled", None)
    return iter(samples) if read is None else read()
