"""What TensorRT calls back: a logger, a profiler, memory for outputs, and the progress of a build.

Needs the standard library only,. The classes are made in functions since their
bases belong to ``tensorrt`` or ``tensorrt_rtx``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from .driver import Driver, allocate, u64
from .sparsity import PREFIX


def make_logger(trt: Any) -> Any:
    """A logger that writes errors and warnings to stderr and keeps the last errors in `errors`."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            failed = severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)
            if failed:
                self.errors = [*self.errors[-9:], message]
            if failed or severity == trt.ILogger.WARNING:
                print(f"[TensorRT {severity.name}] {message}", file=sys.stderr)

    return Log()


def make_profiler(trt: Any) -> Any:
    """A profiler that adds up the milliseconds of each layer in `times`."""

    class LayerTimes(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times[layer_name] = self.times.get(layer_name, 0.0) + ms

    return LayerTimes()


class Told(NamedTuple):
    """Messages of TensorRT that Polygraphy's logger finds too long for the log: those that list an engine's layers.

    Of the layers themselves the last message is kept, of their sparsity all.
    """

    layers: list[str]
    sparsity: list[str]


def listen(logger: Any) -> Told:
    """Keeps messages, from now on."""
    told = Told([], [])
    log = logger.log

    def listening(severity: Any, message: str) -> None:
        if message.startswith("Layers:"):
            told.layers[:] = [message]
        elif message.startswith(PREFIX):
            told.sparsity.append(message)
        log(severity, message)

    logger.log = listening
    return told


def make_allocator(trt: Any, driver: Driver) -> Any:
    """Memory for outputs whose shape is known only once they are computed."""

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.memory: dict[str, u64] = {}
            self.sizes: dict[str, int] = {}
            self.shapes: dict[str, tuple[int, ...]] = {}

        def reallocate_output(self, name: str, memory: int, size: int, alignment: int) -> int:
            if size > self.sizes.get(name, -1):
                if name in self.memory:
                    driver("cuMemFree_v2", self.memory[name])
                self.memory[name], self.sizes[name] = allocate(driver, size), size
            return self.memory[name].value

        def reallocate_output_async(self, name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            return self.reallocate_output(name, memory, size, alignment)

        def notify_shape(self, name: str, shape: Any) -> None:
            self.shapes[name] = tuple(shape)

    return Allocator()


def make_progress_monitor(trt: Any, report: Callable[[float, str], None]) -> Any:
    """Turns TensorRT's nested phases into one growing fraction for `report`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, list[Any]] = {}  # name: parent, steps, steps done
            self.last = 0.02

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases[name] = [parent, max(steps, 1), 0]

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.phases:
                self.phases[name][2] = step + 1
            fraction = 0.02 + 0.95 * max((self.fraction(n) for n, p in self.phases.items() if p[0] is None), default=0)
            if fraction >= self.last + 0.01:
                self.last = fraction
                report(round(fraction, 3), name)
            return True

        def phase_finish(self, name: str) -> None:
            self.phases.pop(name, None)

        def fraction(self, name: str) -> float:
            _, steps, done = self.phases[name]
            children = [self.fraction(n) for n, phase in self.phases.items() if phase[0] == name]
            return min((float(done) + max(children, default=0.0)) / float(steps), 1.0)

    return Monitor()
