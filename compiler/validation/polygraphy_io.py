"""The reference and the engines as Polygraphy runners, and their results in Polygraphy's formats.

results.json     outputs of both, of the first samples   polygraphy inspect data results.json
accuracy.json    SNR and cosine of every sample          polygraphy check accuracy accuracy.json --compare snr
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import AccuracyResult, AccuracyResults, IterationResult, RunResults, compare
from polygraphy.logger import G_LOGGER

from ..data import as_declared
from ..manifest import Tolerance
from ..signature import Signature, TensorSpec
from .metrics import Difference
from .reference import Recorded

if TYPE_CHECKING:
    from ...targets.base import Runner
    from ..sources import Reference

Arrays = Mapping[str, np.ndarray]
MAX_SAVED_BYTES = 8 << 20


class ReferenceRunner(BaseRunner):  # type: ignore[misc]
    """The model as it was given, from its first state at every inference."""

    def __init__(self, reference: Reference, signature: Signature, name: str = "reference") -> None:
        super().__init__(name=name)
        self._reference = reference
        self._signature = signature

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, dtypes and shapes of the inputs."""
        return _metadata(self._signature)

    def infer_impl(self, feed_dict: Arrays) -> OrderedDict[str, np.ndarray]:
        """Outputs of one sample."""
        self._reference.reset()
        start = time.perf_counter()
        outputs = self._reference.run(feed_dict)
        self.inference_time = time.perf_counter() - start
        return OrderedDict((name, _on_host(array)) for name, array in outputs.items())


class EngineRunner(BaseRunner):  # type: ignore[misc]
    """A loaded engine, from its first state at every inference.

    Floating-point inputs are cast to what the engine's own signature declares. The engine stays open.
    """

    def __init__(self, runner: Runner, signature: Signature, name: str) -> None:
        super().__init__(name=name)
        self._runner = runner
        self._signature = signature

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, dtypes and shapes of the inputs."""
        return _metadata(self._signature)

    def infer_impl(self, feed_dict: Arrays) -> OrderedDict[str, np.ndarray]:
        """Outputs of one sample."""
        inputs = as_declared({spec.name: feed_dict[spec.name] for spec in self._signature.inputs}, self._signature)
        self._runner.reset()
        start = time.perf_counter()
        outputs = self._runner.run(inputs)
        self.inference_time = time.perf_counter() - start
        return OrderedDict((name, _on_host(array)) for name, array in outputs.items())


class Trail:
    """What is saved for Polygraphy: the numbers of every sample, and the arrays of the first ones."""

    def __init__(self, engine: str, tolerance: Tolerance) -> None:
        self._pair = ("reference", engine)
        self._tolerance = tolerance
        self._differences: list[dict[str, Difference]] = []
        self._outputs: list[tuple[Arrays, Arrays, float]] = []
        self._bytes = 0

    def add(self, sample: Recorded, outputs: Arrays, differences: dict[str, Difference], seconds: float) -> None:
        """Takes in one sample; its arrays are kept while all together stay below MAX_SAVED_BYTES."""
        self._differences.append(differences)
        size = sum(array.nbytes for part in (sample.outputs, outputs) for array in part.values())
        self._bytes += size
        if self._bytes <= MAX_SAVED_BYTES:
            self._outputs.append((sample.outputs, {k: np.array(v) for k, v in outputs.items()}, seconds))

    def save(self, directory: Path) -> None:
        """Writes results.json and accuracy.json."""
        reference, engine = self._pair
        results = RunResults()
        results[reference] = [IterationResult(dict(r), None, reference) for r, _, _ in self._outputs]
        results[engine] = [IterationResult(dict(y), seconds, engine) for _, y, seconds in self._outputs]
        with G_LOGGER.verbosity(G_LOGGER.WARNING):
            results.save(str(directory / "results.json"))
            self._accuracy().save(str(directory / "accuracy.json"))

    def _accuracy(self) -> AccuracyResults:
        snr_bound = compare.SnrThreshold(-20 * math.log10(max(self._tolerance["relative_l2"], 1e-300)))
        cosine_bound = compare.CosineSimilarityThreshold(self._tolerance["cosine"])

        def snr(found: Difference) -> Any:
            value = found.snr_db if found.snr_db is not None else math.inf if _is_equal(found) else -math.inf
            return compare.SnrResult(value, thresholds=snr_bound)

        def cosine(found: Difference) -> Any:
            value = found.cosine if found.cosine is not None else 1.0 if _is_equal(found) else 0.0
            return compare.CosineSimilarityResult(value, thresholds=cosine_bound)

        tables = []
        for result in (snr, cosine):
            rows = [OrderedDict((name, result(found)) for name, found in s.items()) for s in self._differences]
            table = AccuracyResult()
            table[self._pair] = rows
            tables.append(table)
        return AccuracyResults(tables)


def host_dtype(spec: TensorSpec) -> str:
    """The dtype in which an output is compared and kept: float32 for bfloat16, which NumPy does not have."""
    return "float32" if spec.dtype == "bfloat16" else spec.dtype


def _on_host(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if str(array.dtype) == "bfloat16" else array


def _is_equal(found: Difference) -> bool:
    """Whether an output without numbers, of integers or zeros for instance, is that of the reference."""
    return not found.relative_l2 and not found.problem


def _metadata(signature: Signature) -> TensorMetadata:
    metadata = TensorMetadata()
    for spec in signature.inputs:
        metadata.add(
            spec.name, dtype=np.dtype(spec.dtype), shape=[d if isinstance(d, int) else None for d in spec.shape]
        )
    return metadata
