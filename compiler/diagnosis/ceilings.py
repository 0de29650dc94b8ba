"""What this machine can do at most: operations and bytes a second, and how long it takes to start a kernel.

Measured once, by `stopwatch`, and kept in the cache. Others on the machine only make a ceiling too low, so what was
measured while it was busy is measured again, and the better of the two stays.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..graph.work import Work
from ..machine.environment import environment
from ..storage.cache import Cache, key

FORMAT = 1
BUSY = 0.12
"""Share of the processors that others may take while a ceiling is measured."""

Device = Literal["cpu", "cuda"]


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Of one device.

    Attributes:
        gflops: by precision, in thousands of millions of operations a second; those that it lacks are left out.
        unaligned_gflops: the same of products whose dimensions are one short of a multiple.
        bandwidths: GB/s by the bytes of what is worked on, from what fits in the caches to what does not.
        launch_us: what a kernel that does nothing adds to a call.
        graph_launch_us: the same within a CUDA graph.
        transfer_gb_s: from the host to the device.
        busy: the share of the processors that others took meanwhile.
    """

    device: Device
    name: str
    gflops: Mapping[str, float]
    unaligned_gflops: Mapping[str, float]
    bandwidths: tuple[tuple[float, float], ...]
    launch_us: float
    graph_launch_us: float | None = None
    transfer_gb_s: float | None = None
    busy: float = 0.0

    @property
    def memory_gb_s(self) -> float:
        """Bandwidth of memory: of what no cache holds."""
        return self.bandwidths[-1][1]

    def bandwidth_gb_s(self, working_bytes: float) -> float:
        """Bandwidth of what is that large, by the logarithm of its size between what was measured."""
        points = self.bandwidths
        if working_bytes <= points[0][0]:
            return points[0][1]
        for (small, fast), (large, slow) in itertools.pairwise(points):
            if working_bytes <= large:
                part = math.log(working_bytes / small) / math.log(large / small)
                return fast + part * (slow - fast)
        return points[-1][1]

    def compute_ms(self, work: Work, *, aligned: bool = True) -> float:
        """The least time of the operations; those outside of products run at the rate of fp32."""
        rates = self.gflops if aligned else {**self.gflops, **self.unaligned_gflops}
        plain = self.gflops["fp32"]
        rate = rates.get(work.precision, plain)
        return (work.heavy / rate + (work.flops - work.heavy) / plain) / 1e6

    def bandwidth_ms(self, work: Work, call_bytes: float) -> float:
        """The least time of what is moved.

        Args:
            call_bytes: what a whole call moves. Weights come back once a call, so they are as far away as that; other
                tensors were just written.
        """
        weights = work.weight_bytes / self.bandwidth_gb_s(call_bytes)
        return (weights + work.moved_bytes / self.bandwidth_gb_s(work.moved_bytes)) / 1e6

    def launch_ms(self, *, graph: bool = False) -> float:
        """What starting a kernel takes."""
        within = self.graph_launch_us if graph else None
        return (self.launch_us if within is None else within) / 1000

    def raised(self, reached: Mapping[str, float]) -> Ceilings:
        """With the rates that an engine reached, where they are above: then the ceilings were measured too low."""
        higher = {name: rate for name, rate in reached.items() if rate > self.gflops.get(name, math.inf)}
        return dataclasses.replace(self, gflops={**self.gflops, **higher}) if higher else self

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "bandwidths": [list(point) for point in self.bandwidths]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ceilings:
        """The inverse of `to_json`."""
        points = tuple((float(size), float(rate)) for size, rate in value["bandwidths"])
        return cls(**{**value, "bandwidths": points})


def ceilings(device: Device, cache: Cache) -> Ceilings:
    """The ceilings of a device of this machine: from the cache, or measured, which takes some seconds.

    Raises:
        EngineError: torch finds no such device.
    """
    file = cache.folder("machine") / f"ceilings-{device}-{_machine_key()[:16]}.json"
    kept = _read(file)
    if kept is not None and kept.busy <= BUSY:
        return kept
    found = _measured(device)
    if kept is not None:
        found = better(kept, found)
    _write(file, found)
    return found


@functools.cache
def _measured(device: Device) -> Ceilings:
    """Once a process: where the machine is busy, it will be so a second later."""
    from .stopwatch import measure

    return measure(device)


def better(first: Ceilings, second: Ceilings) -> Ceilings:
    """The higher of two measurements of each ceiling, and the shorter of two launches."""
    sizes = dict(first.bandwidths)
    launches = [c.graph_launch_us for c in (first, second) if c.graph_launch_us is not None]
    transfers = [c.transfer_gb_s for c in (first, second) if c.transfer_gb_s is not None]
    return dataclasses.replace(
        second,
        gflops=_highest(first.gflops, second.gflops),
        unaligned_gflops=_highest(first.unaligned_gflops, second.unaligned_gflops),
        bandwidths=tuple((size, max(rate, sizes.get(size, 0.0))) for size, rate in second.bandwidths),
        launch_us=min(first.launch_us, second.launch_us),
        graph_launch_us=min(launches, default=None),
        transfer_gb_s=max(transfers, default=None),
        busy=min(first.busy, second.busy),
    )


def _highest(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {name: max(first.get(name, 0.0), second.get(name, 0.0)) for name in {**first, **second}}


def _machine_key() -> str:
    machine = environment()
    packages = {name: machine["packages"].get(name) for name in ("onnxruntime", "onnxruntime-gpu", "torch")}
    return key({"format": FORMAT, "cpu": machine.get("cpu"), "gpus": machine.get("gpus"), "packages": packages})


def _read(file: Path) -> Ceilings | None:
    try:
        return Ceilings.from_json(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or one that was damaged
        return None


def _write(file: Path, found: Ceilings) -> None:
    """Keeps them; a cache that cannot be written is no reason to fail."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as written:
            json.dump(found.to_json(), written, indent=1)
        os.replace(written.name, file)
    except OSError:
        return
