"""What torch's profiler tells of the operators that torch runs, by the shapes that they are given.

An operator that calls others counts as one with them: ``aten::linear``, not the ``aten::addmm`` within. torch knows no
graph: what an operator reads is taken from the shapes of its inputs; what it writes, torch does not tell.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from .base import Arrays, Runner
from .profile import LayerTime, Profile, calls_for, medians

CALL = "enginesmith::call"
MODULE = "module "
"""Names of what is recorded around a call, and around a module's forward."""

NOTE = "torch tells what operators read, not what they write, and nothing of the loops that it has compiled"


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operator at some shapes, within one module: medians over calls."""

    operator: str
    shapes: tuple[tuple[int, ...], ...]
    module: str
    ms: float
    count: int
    flops: float

    def bytes_read(self, element_bytes: float) -> float:
        """Of all inputs that are tensors."""
        return element_bytes * self.count * sum(map(math.prod, self.shapes))


def profile_runner(runner: Runner, inputs: Arrays, device: Literal["cpu", "cuda"], precision: str) -> Profile:
    """The operators of an engine as its layers; closes the engine."""
    with contextlib.closing(runner):
        bound = runner.bind(inputs)

        def run() -> None:
            bound.run()
            bound.synchronize()

        found, calls = operations(run, device)
    element_bytes = 4.0 if precision == "fp32" else 2.0
    layers = []
    for operation in found:
        shapes = " ".join("x".join(map(str, shape)) for shape in operation.shapes[:3])
        moved = operation.bytes_read(element_bytes) if operation.shapes else None
        name = f"{operation.operator} {shapes}".strip()
        flops = operation.flops or None
        layers.append(LayerTime(name, operation.operator, operation.ms, device, flops=flops, bytes=moved))
    return Profile(tuple(layers), "torch's profiler", calls, notes=(NOTE,), complete=False)


def operations(run: Callable[[], object], device: str) -> tuple[list[Operation], int]:
    """Runs some times under the profiler; gives the operators in the order in which they ran, and how many calls."""
    import torch

    run()
    start = time.perf_counter()
    run()
    calls = calls_for(1000 * (time.perf_counter() - start))
    # Kineto, which only the GPU needs, prints lines of its own.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    using: dict[str, Any] = {"use_device": "cuda"} if device == "cuda" else {"use_kineto": False}
    with torch.autograd.profiler.profile(record_shapes=True, with_flops=True, **using) as profiler:
        for _ in range(calls):
            with torch.profiler.record_function(CALL):
                run()
    return read_events(profiler.function_events or [], device), calls


Key = tuple[str, tuple[tuple[int, ...], ...], str]


def read_events(events: Iterable[Any], device: str) -> list[Operation]:
    """Operators from the events of the profiler: those that no other operator called."""
    runs: dict[int, dict[str, float]] = {}
    facts: dict[str, tuple[Key, list[int], list[float]]] = {}
    for event in events:
        call = _ancestor(event, lambda name: name == CALL)
        if call is None or not _is_operator(event.name) or _ancestor(event, _is_operator) is not None:
            continue
        module = _ancestor(event, lambda name: name.startswith(MODULE))
        key = (event.name, _shapes(event), module.name.removeprefix(MODULE) if module is not None else "")
        spent_us = event.device_time_total if device == "cuda" else event.cpu_time_total
        run = runs.setdefault(id(call), {})
        run[str(key)] = run.get(str(key), 0.0) + spent_us / 1000
        _, counts, flops = facts.setdefault(str(key), (key, [], []))
        counts.append(id(call))
        flops.append(sum(float(inner.flops or 0.0) for inner in _subtree(event)))
    found = []
    for text, ms in medians(runs.values()).items():
        (operator, shapes, module_name), seen, flops = facts[text]
        count = max(collections.Counter(seen).values())
        found.append(Operation(operator, shapes, module_name, ms, count, sum(flops) / len(runs)))
    return found


def _is_operator(name: str) -> bool:
    return "::" in name and name != CALL


def _ancestor(event: Any, wanted: Callable[[str], bool]) -> Any:
    """The nearest event around this one whose name is wanted; None where there is none."""
    outer = event.cpu_parent
    while outer is not None and not wanted(outer.name):
        outer = outer.cpu_parent
    return outer


def _subtree(event: Any) -> Iterator[Any]:
    yield event
    for child in event.cpu_children:
        yield from _subtree(child)


def _shapes(event: Any) -> tuple[tuple[int, ...], ...]:
    shapes = (tuple(shape) for shape in event.input_shapes or ())
    return tuple(shape for shape in shapes if shape and all(isinstance(axis, int) for axis in shape))
