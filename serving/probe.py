"""Asks a server for a real inference, and judges the answer: a model that is ready may still be dead, or wrong."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..compiler.engine import ranked, read_manifest
from ..compiler.manifest import EngineRecord
from ..compiler.signature import Signature
from ..compiler.validation.metrics import compare
from ..compiler.validation.reference import Recorded, ReferenceOutputs
from ..errors import DataError, EngineError
from .endpoint import Endpoint
from .prompt import Prompt
from .wire import infer_input

PROBE_ID = "enginesmith-probe-"
SLACK = 2
"""An answer may be as far from the reference as this many times the worst that validation found."""

_BUSY = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")


class ProbeError(EngineError):
    """The server gave no answer, or a wrong one. `busy` where that may only mean that others were first."""

    def __init__(self, reason: str, *, busy: bool = False, wrong: bool = False) -> None:
        super().__init__(reason)
        self.busy = busy
        self.wrong = wrong


class Prober(Protocol):
    """What asks a server."""

    def __call__(self, timeout_s: float) -> None:
        """Raises ProbeError where no answer comes, or a wrong one."""

    def done(self) -> int:
        """How many requests were answered; -1 where it cannot be told."""

    def load(self, timeout_s: float) -> None:
        """Has the server load the model again; raises ProbeError where it cannot."""

    def close(self) -> None:
        """Asks no more."""


class Probe:
    """One recorded sample of a bundle, sent to a model again and again.

    Args:
        model: its name on the server; may be changed.
        engine: the one that is served; the bundle's best where None.

    Raises:
        EngineError: the bundle has no sample that can be sent.
        TargetUnavailableError: tritonclient is missing.
    """

    def __init__(self, bundle: Path, model: str, endpoint: Endpoint, engine: str | None = None) -> None:
        manifest = read_manifest(bundle)
        record = next((r for r in manifest["engines"] if r["name"] == engine), None) or next(iter(ranked(manifest)))
        signature = Signature.from_json(manifest["signature"])
        question = Prompt if signature.states else _Sample
        self._ask = question(bundle, signature, limit_of(record))
        self.model = model
        self._numbers = itertools.count()
        self._headers = endpoint.admin_headers
        self.client = endpoint.client()

    def __call__(self, timeout_s: float) -> None:
        """Raises ProbeError where no answer comes, or a wrong one."""
        from tritonclient.utils import InferenceServerException

        number = f"{PROBE_ID}{next(self._numbers)}"
        try:
            problem = self._ask(self.client, self.model, number, timeout_s)
        except InferenceServerException as error:
            status = str(error.status() or "").removeprefix("StatusCode.")
            raise ProbeError(f"{status}: {error.message()}", busy=status in _BUSY) from error
        if problem:
            raise ProbeError(problem, wrong=True)

    def done(self) -> int:
        """How many requests the model has answered since it was loaded."""
        from tritonclient.utils import InferenceServerException

        try:
            stats = self.client.get_inference_statistics(self.model, client_timeout=5)
        except InferenceServerException:
            return -1
        return sum(int(model.inference_count) for model in stats.model_stats)

    def load(self, timeout_s: float) -> None:
        """Has the server load the model again, where its files changed.

        Raises:
            ProbeError: it cannot.
        """
        from tritonclient.utils import InferenceServerException

        try:
            self.client.load_model(self.model, headers=self._headers, client_timeout=timeout_s)
        except InferenceServerException as error:
            raise ProbeError(error.message()) from error

    def unload(self, timeout_s: float) -> None:
        """Has the server let go of the model, where it has it, and waits until its memory is free again."""
        from tritonclient.utils import InferenceServerException

        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(InferenceServerException):
            self.client.unload_model(self.model, headers=self._headers, client_timeout=timeout_s)
            while self._is_unloading(timeout_s) and time.monotonic() < deadline:
                time.sleep(0.05)

    def _is_unloading(self, timeout_s: float) -> bool:
        index = self.client.get_model_repository_index(headers=self._headers, client_timeout=timeout_s)
        return any(model.name == self.model and model.state == "UNLOADING" for model in index.models)

    def close(self) -> None:
        """Ends the connection."""
        self.client.close()


class _Sample:
    """A recorded sample, as a call with one answer."""

    def __init__(self, bundle: Path, signature: Signature, limit: float) -> None:
        self._sample = _smallest(bundle, signature)
        self._limit = limit
        self._inputs = [infer_input(name, array) for name, array in self._sample.inputs.items()]

    def __call__(self, client: Any, model: str, number: str, timeout_s: float) -> str:
        """What is wrong with the answer; empty where it is right."""
        result = client.infer(model, self._inputs, request_id=number, client_timeout=timeout_s)
        outputs = {name: result.as_numpy(name) for name in self._sample.outputs}
        return difference(self._sample.outputs, outputs, self._limit)


def difference(reference: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray | None], limit: float) -> str:
    """What is wrong with an answer, of the first output that is; empty where it is right.

    Args:
        limit: relative L2 that an output may be from the reference; integers and booleans are not compared.
    """
    for name, expected in reference.items():
        output = outputs[name]
        if output is None:
            return f"output {name!r} is missing"
        if output.shape != expected.shape:
            return f"output {name!r} has shape {output.shape}, not {expected.shape}"
        if expected.dtype.kind != "f":
            continue
        found = compare(expected, output, str(output.dtype))
        if found.problem or found.nan or found.inf or (found.relative_l2 or 0) > limit:
            return (
                f"output {name!r} is {found.relative_l2} (relative L2) from the reference, with {found.nan} NaN and "
                f"{found.inf} Inf, where at most {limit:.3g} was expected{found.problem and f': {found.problem}'}"
            )
    return ""


def _smallest(bundle: Path, signature: Signature) -> Recorded:
    try:
        return min(ReferenceOutputs(bundle / "reference", signature), key=lambda sample: sample.nbytes)
    except (DataError, ValueError) as error:
        raise EngineError(
            f"{bundle} has no recorded sample to probe the server with", hint="compile it again"
        ) from error


def limit_of(record: EngineRecord) -> float:
    """Relative L2 that an engine's outputs may be from the reference's; without end where it was not validated."""
    validation = record["validation"]
    if validation is None:
        return float("inf")
    worst = max((output["relative_l2"] or 0 for output in validation["outputs"]), default=0.0)
    return max(validation["tolerance"]["relative_l2"], SLACK * worst)
