"""The process that runs an engine at one batch size after another, and may die of it.

It answers requests as `targets._worker` describes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import EngineError
from ...targets import _serve, get_target
from ...targets.base import Arrays, Bound, EngineInfo, Runner
from ..benchmark.gpu_monitor import GpuMonitor
from ..benchmark.rounds import FAILURES, Candidate, Settings, SizedInputs, benchmark
from ..data import resized
from .memory import data_limit, forget_peak, reason_of, status_bytes, volunteer

RUNS = 3
"""Runs of a probe: runtimes plan their memory in the first and specialize in the second."""


def command() -> list[str]:
    """The command of the worker."""
    return _serve.command(__name__)


class Commands:
    """Every public method is a command, and its arguments are the request's."""

    def __init__(self) -> None:
        self._directory = Path()
        self._sample: dict[str, np.ndarray] = {}
        self._info: EngineInfo | None = None
        self._runner: Runner | None = None
        self._gpu: GpuMonitor | None = None
        self._before = 0

    def open(self, directory: str, sample: str, on_gpu: bool) -> dict[str, Any]:
        """Opens the engine in `directory`, and reads the inputs that batches are made of."""
        volunteer()
        if on_gpu:
            self._gpu = GpuMonitor().__enter__()
            self._before = self._gpu.memory_bytes() or 0
        self._directory = Path(directory)
        self._info = EngineInfo.read(self._directory)
        with np.load(sample, allow_pickle=False) as arrays:
            self._sample = {name: arrays[name] for name in arrays.files}
        self._runner = self._open()
        return {}

    def probe(self, sizes: Mapping[str, int], growth_bytes: int | None) -> dict[str, Any]:
        """Runs a few times at these sizes of the dynamic axes; {"failed": why} where that cannot be.

        Args:
            growth_bytes: what it may take beyond what this process has now; None for no limit.
        """
        runner = self._opened()
        forget_peak()
        try:
            with data_limit(growth_bytes):
                runner.reset()
                times, _ = runner.bind(self._arrays(sizes)).timed(RUNS)
                memory = self._memory_bytes()
        except FAILURES as error:
            return {"failed": reason_of(error)}
        return {"ms": min(times), "memory_bytes": memory}

    def time(
        self, batches: list[dict[str, Any]], growth_bytes: int | None, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Times batches side by side, as `benchmark` times engines; its timings and what it skipped, by batch.

        Args:
            batches: "batch", the "sizes" of the dynamic axes and the "slice_s" of each.
            growth_bytes: as of `probe`.
            settings: fields of the benchmark's `Settings`.
        """
        with data_limit(growth_bytes), contextlib.ExitStack() as stack:
            candidates = [
                Candidate(str(item["batch"]), self._sized(item["sizes"], stack), item["slice_s"]) for item in batches
            ]
            result = benchmark(
                candidates,
                [SizedInputs({}, 1, {})],  # each candidate has its own
                baseline=candidates[0].name,
                protocol=Settings(**settings),
            )
        timings = {timing["candidate"]: timing for timing in result["timings"]}
        return {"timings": timings, "skipped": result["skipped"]}

    def close(self) -> dict[str, Any]:
        """Lets go of the engine."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None
        if self._gpu is not None:
            self._gpu.__exit__(None, None, None)
        return {}

    def _sized(self, sizes: Mapping[str, int], stack: contextlib.ExitStack) -> Runner:
        """The engine at one size. One with state is opened for each, since the state has that size too."""
        runner, info = self._opened(), self._info
        if info is not None and info.stateful:
            runner = self._open()
            stack.callback(runner.close)
        return _Sized(runner, self._arrays(sizes))

    def _open(self) -> Runner:
        assert self._info is not None
        return get_target(self._info.target, self._info.options).runner(self._directory, self._info)

    def _opened(self) -> Runner:
        if self._runner is None:
            raise EngineError("no engine is loaded")
        return self._runner

    def _arrays(self, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        assert self._info is not None
        return resized(self._info.signature, self._sample, sizes)

    def _memory_bytes(self) -> int | None:
        if self._gpu is None:
            return status_bytes("VmHWM") or None
        used = self._gpu.memory_bytes()
        return None if used is None else max(0, used - self._before)


class _Sized:
    """A runner that is given inputs of its own, whatever it is called with."""

    def __init__(self, runner: Runner, arrays: Arrays) -> None:
        self._runner = runner
        self._arrays = arrays

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Runs on its inputs."""
        return self._runner.run(self._arrays)

    def bind(self, inputs: Arrays) -> Bound:
        """Places its inputs."""
        return self._runner.bind(self._arrays)

    def reset(self) -> None:
        """Returns an engine with state to its first."""
        self._runner.reset()

    def close(self) -> None:
        """Leaves that to who opened the engine."""


def main() -> None:
    """Answers requests until the parent closes stdin."""
    _serve.serve(Commands())
