"""Runs batches of one engine in worker processes, whose death is a result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ...errors import EngineError
from ...targets._worker import Worker
from ..benchmark.gpu_monitor import GpuMonitor
from .largest import Probe
from .memory import Watch, reason_of, room_bytes
from .worker import command

PROBE_S = 120.0
"""A batch whose few runs take longer than this serves nobody."""

OPEN_S = 600.0
TIME_S = 3600.0

PROBING_S = 0.02
TIMING_S = 0.5
"""Time between two looks at the memory; rarely where the looks themselves would disturb a measurement."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is run.

    Attributes:
        directory: folder of the engine.
        sample: .npz file with inputs that batches are made of.
        sizes: of the dynamic axes other than the batch axis.
        axis: the batch axis.
        limit_bytes: memory that a batch may take beyond the loaded engine; None for what is free. On a CPU only.
    """

    directory: Path
    sample: Path
    sizes: Mapping[str, int]
    axis: str
    on_gpu: bool
    limit_bytes: int | None = None
    probe_s: float = PROBE_S


class Processes:
    """Worker processes for one engine. A context manager; they are ended with it.

    On a CPU a batch may take what is free, a reserve left out: see `memory`. A GPU refuses what it does not have, and
    there the process alone is watched.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._kept: Worker | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def probe(self, batch: int, *, alone: bool) -> Probe:
        """Tries a batch; `alone` in a process of its own, else in one that others of these were tried in."""
        if alone:
            self._end()
        try:
            answer = self._call("probe", timeout_s=self._subject.probe_s, period_s=PROBING_S, sizes=self._sizes(batch))
        except EngineError as error:
            self._end()
            return Probe(batch, False, reason=_reason(error))
        finally:
            if alone:
                self._end()
        if "failed" in answer:
            self._end()  # what a failed run leaves behind is anybody's guess
            return Probe(batch, False, reason=answer["failed"])
        return Probe(batch, True, ms=answer["ms"], memory_bytes=answer["memory_bytes"])

    def time(
        self, slices_s: Mapping[int, float], settings: Mapping[str, Any]
    ) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
        """Times batches side by side in a process of their own: timings, and why others could not be timed.

        Args:
            slices_s: how long each is timed in a round, by batch.
            settings: fields of the benchmark's `Settings`.
        """
        self._end()
        batches = [{"batch": n, "sizes": self._sizes(n), "slice_s": slice_s} for n, slice_s in slices_s.items()]
        try:
            found = self._call("time", timeout_s=TIME_S, period_s=TIMING_S, batches=batches, settings=settings)
        except EngineError as error:
            return {}, dict.fromkeys(slices_s, _reason(error))
        finally:
            self._end()
        return (
            {int(batch): timing for batch, timing in found["timings"].items()},
            {int(batch): reason for batch, reason in found["skipped"].items()},
        )

    def room_bytes(self) -> int:
        """What batches may take together, on the device that they run on."""
        if self._subject.on_gpu:
            with GpuMonitor() as gpu:
                return gpu.free_bytes() or 0
        return self._growth_bytes() or 0

    def _sizes(self, batch: int) -> dict[str, int]:
        return {**self._subject.sizes, self._subject.axis: batch}

    def _growth_bytes(self) -> int | None:
        if self._subject.on_gpu:
            return None
        limit = self._subject.limit_bytes
        return room_bytes() if limit is None else min(limit, room_bytes())

    def _call(self, request: str, *, timeout_s: float, period_s: float, **arguments: Any) -> dict[str, Any]:
        """Opens the engine where it is not yet, and makes a request under watch."""
        worker = self._kept or self._start()
        growth = self._growth_bytes()
        with Watch(worker.pid, worker.kill, growth_bytes=growth, period_s=period_s) as watch:
            return self._translated(
                watch, lambda: worker.call(request, timeout_s=timeout_s, growth_bytes=growth, **arguments)
            )

    def _start(self) -> Worker:
        subject = self._subject
        self._kept = worker = Worker(command(), name="the batch worker", failure=EngineError)
        paths: dict[str, Any] = {
            "directory": str(subject.directory.absolute()),
            "sample": str(subject.sample.absolute()),
        }
        with Watch(worker.pid, worker.kill, growth_bytes=None, period_s=PROBING_S) as watch:
            self._translated(watch, lambda: worker.call("open", timeout_s=OPEN_S, on_gpu=subject.on_gpu, **paths))
        return worker

    @staticmethod
    def _translated(watch: Watch, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A death that the watch brought has the reason that the watch had."""
        try:
            return call()
        except EngineError as error:
            if watch.reason:
                raise EngineError(watch.reason) from error
            raise

    def _end(self) -> None:
        worker, self._kept = self._kept, None
        if worker is not None:
            worker.close()


def _reason(error: EngineError) -> str:
    """Why a worker failed, with the last line of its log."""
    log = [line.strip() for line in str(error.found or "").splitlines()[1:]]
    return reason_of(EngineError(error.message), log[-1] if log else "")
