"""Times candidates against each other: warmed up, interleaved in random order, with the interval of every ratio.

Running A to the end and then B compares the machine at two times: clocks, temperature and neighbours change between
seconds by more than most optimizations gain. So every round here runs each candidate for a short slice, in an order
drawn anew, and a ratio is taken between slices of one round only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from ...errors import EnginesmithError, RecipeError, UnknownNameError, UsageError
from ...targets.base import Arrays, Bound, HostBound, Runner
from ..manifest import Benchmark, Protocol, SpeedUp, Timing
from ..signature import Signature
from .cpu_monitor import ForeignCpu
from .gpu_monitor import GpuMonitor, GpuUse
from .intervals import speed_up
from .slices import STEADY_SPREAD, STEADY_WINDOWS, Slices

FAILURES = (EnginesmithError, RuntimeError, ValueError, OSError, MemoryError)
"""What a runtime raises when it cannot run a model; anything else is a bug and is not hidden."""

FOREIGN_CPU_LIMIT = 0.12
"""A round during which other processes took a larger share of all processors than this is measured again."""

MIN_ROUNDS = 6
"""A 95 % interval of a median needs six: all of five rounds lie on one side of it in 2 / 2^5 = 6 % of runs."""

WARMUP_SLICES = 8
"""A warm-up lasts no longer than this many slices: who asks for short ones has little time."""

SLOW_FACTOR = 3
SLOW_ROUNDS = MIN_ROUNDS
"""Where single calls outlast a slice, rounds stop after this many once they took this multiple of the planned time."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long and in which way to measure.

    Attributes:
        rounds: interleaved rounds at each size; the interval of a ratio is taken over them.
        slice_s: how long a candidate runs in a round; one call at least.
        warmup_s: longest warm-up of a candidate at a size; three windows of one call at least. Short slices shorten it,
            to `WARMUP_SLICES` of them.
        transfers: time calls that take and give NumPy arrays, instead of inputs already on the device.
        seed: of the order within rounds, and of the bootstrap.
    """

    rounds: int = 10
    slice_s: float = 0.08
    warmup_s: float = 0.3
    transfers: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < MIN_ROUNDS:
            raise RecipeError("too few rounds for an interval", expected=f"{MIN_ROUNDS} or more", found=self.rounds)
        if self.slice_s <= 0 or self.warmup_s <= 0:
            raise RecipeError("a slice and the warm-up must last", expected="seconds above 0", found=self)

    def longest_warmup_s(self, slice_s: float) -> float:
        """Seconds that a candidate with such slices may warm up."""
        return min(self.warmup_s, WARMUP_SLICES * slice_s)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Something to time. `runner` is a loaded engine, or loads one, which is then closed after the benchmark.

    `slice_s` is how long it runs in a round, None for as long as the settings say.
    """

    name: str
    runner: Runner | Callable[[], Runner]
    slice_s: float | None = None


@dataclasses.dataclass(frozen=True)
class SizedInputs:
    """Inputs at one size of the dynamic axes; `batch` is the number of samples in them."""

    sizes: Mapping[str, int]
    batch: int
    arrays: Arrays


def batch_sizes(signature: Signature) -> list[dict[str, int]]:
    """Sizes to measure: minimum, optimum, maximum of the batch axis and the powers of 4 between; other axes at opt."""
    name = signature.batch_axis
    if name is None:
        return [signature.sizes()]
    axis = signature.axes[name]
    powers = {4**exponent for exponent in range(axis.max.bit_length())}
    batches = {axis.min, axis.opt, axis.max} | {power for power in powers if power in axis}
    return [{**signature.sizes(), name: batch} for batch in sorted(batches)]


def benchmark(
    candidates: Sequence[Candidate],
    inputs: Sequence[SizedInputs],
    *,
    baseline: str,
    protocol: Settings | None = None,
    siblings: Mapping[str, str] | None = None,
    on_progress: Callable[[float, str], None] = lambda fraction, phase: None,
) -> Benchmark:
    """Times every candidate at every size. One that fails is skipped with the reason, under its name and size.

    Percentiles are over single calls of all rounds, throughput is of calls made one after the other, and a speed-up
    compares host times with the baseline's at the same size (see `intervals.speed_up`).

    Args:
        siblings: names of candidates that others are compared with beside the baseline, by the name of the other.
        on_progress: takes the fraction done, 0 to 1, and what is being measured.

    Raises:
        UnknownNameError: `baseline` is no candidate.
        UsageError: two candidates of one name.
    """
    settings = protocol or Settings()
    names = [candidate.name for candidate in candidates]
    if baseline not in names:
        raise UnknownNameError("baseline", baseline, names)
    if len(set(names)) < len(names):
        raise UsageError("two candidates of a benchmark have the same name", found=", ".join(names))
    with contextlib.ExitStack() as stack:
        run = _Run(settings, baseline, siblings or {}, stack.enter_context(GpuMonitor()))
        for candidate in candidates:
            on_progress(0.0, f"load {candidate.name}")
            run.load(candidate, stack)
        for number, sized in enumerate(inputs):
            on_progress(number / len(inputs), f"benchmark {_text(sized.sizes)}".strip())
            run.measure(sized)
    on_progress(1.0, "benchmark")
    return Benchmark(protocol=run.protocol(), baseline=baseline, timings=run.timings, skipped=run.skipped)


class _Run:
    """What is loaded and measured so far. `memory` is what each candidate added to the device until now, in bytes."""

    def __init__(self, settings: Settings, baseline: str, siblings: Mapping[str, str], gpu: GpuMonitor) -> None:
        self.timings: list[Timing] = []
        self.skipped: dict[str, str] = {}
        self._settings = settings
        self._baseline = baseline
        self._siblings = siblings
        self._gpu = gpu
        self._runners: dict[str, Runner] = {}
        self._slices_s: dict[str, float] = {}
        self._memory: dict[str, int] = {}
        self._order = np.random.default_rng(settings.seed)
        self._repeated = self._disturbed = 0

    def load(self, candidate: Candidate, stack: contextlib.ExitStack) -> None:
        """Opens a candidate, and has it closed with `stack` where it was opened here."""
        with self._skipping(candidate.name), self._counting_memory(candidate.name):
            if callable(candidate.runner):
                runner = candidate.runner()
                stack.callback(runner.close)
            else:
                runner = candidate.runner
            self._runners[candidate.name] = runner
            self._slices_s[candidate.name] = candidate.slice_s or self._settings.slice_s

    def measure(self, sized: SizedInputs) -> None:
        """All loaded candidates at one size."""
        active: dict[str, Slices] = {}
        for name in self._runners:
            with self._skipping(name, sized), self._counting_memory(name):
                active[name] = self._prepare(name, sized)
        self._interleave(active, sized)
        for name, slices in active.items():
            use = GpuUse()
            if any(slices.device_ms[0]) or self._memory[name]:
                use = slices.gpu_use(self._gpu)
            self.timings.append(self._timing(name, sized, active, use))

    def protocol(self) -> Protocol:
        """How it was run, with what happened on the way."""
        settings = self._settings
        where = "with transfers from and to NumPy arrays" if settings.transfers else "inputs already on the device"
        return Protocol(
            rounds=settings.rounds,
            slice_s=settings.slice_s,
            warmup_s=settings.longest_warmup_s(settings.slice_s),
            order="interleaved: all candidates once a round, in seeded random order",
            transfers=settings.transfers,
            seed=settings.seed,
            threads=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            description=(
                f"Each candidate warmed up until {STEADY_WINDOWS} windows agree within {STEADY_SPREAD:.0%}, then "
                f"{settings.rounds} rounds of {settings.slice_s:g} s slices ({SLOW_ROUNDS} rounds or more where calls "
                f"are slow), {where}. Every call timed by itself, one after the other, synchronised. Ratios: median "
                f"over the rounds, 95 % bootstrap interval. Rounds with over {FOREIGN_CPU_LIMIT:.0%} foreign CPU: "
                f"{self._repeated} repeated, {self._disturbed} kept."
            ),
        )

    def _prepare(self, name: str, sized: SizedInputs) -> Slices:
        runner = self._runners[name]
        runner.reset()
        if self._settings.transfers:
            bound: Bound = HostBound(lambda: runner.run(sized.arrays))
        else:
            bound = runner.bind(sized.arrays)
        slice_s = self._slices_s[name]
        return Slices(bound, slice_s, self._settings.longest_warmup_s(slice_s))

    def _interleave(self, active: dict[str, Slices], sized: SizedInputs) -> None:
        """The rounds. One that other processes disturbed is repeated, up to half as often as there are rounds."""
        kept, repeats = 0, self._settings.rounds // 2
        planned_s = self._settings.rounds * sum(self._slices_s[name] for name in active)
        deadline = time.perf_counter() + SLOW_FACTOR * planned_s
        foreign = ForeignCpu()
        while active and kept < self._settings.rounds:
            late = time.perf_counter() > deadline
            if late and kept >= SLOW_ROUNDS:
                return
            foreign.start()
            taken = {}
            for name in self._order.permutation(list(active)).tolist():
                with self._skipping(name, sized):
                    taken[name] = active[name].take()
            for name in active.keys() - taken.keys():
                del active[name]
            disturbed = foreign.share() > FOREIGN_CPU_LIMIT
            if disturbed and repeats and not late:
                repeats -= 1
                self._repeated += 1
                continue
            for name, times in taken.items():
                active[name].keep(*times)
            kept += 1
            self._disturbed += disturbed

    def _timing(self, name: str, sized: SizedInputs, active: Mapping[str, Slices], use: GpuUse) -> Timing:
        slices = active[name]
        host, device = np.concatenate(slices.host_ms), np.concatenate(slices.device_ms)
        p50, p90, p99 = np.percentile(host, [50, 90, 99]).tolist()
        requests_per_s = 1000 / float(host.mean())
        return Timing(
            candidate=name,
            sizes=dict(sized.sizes),
            batch=sized.batch,
            iterations=len(host),
            mean_ms=float(host.mean()),
            p50_ms=p50,
            p90_ms=p90,
            p99_ms=p99,
            samples_per_s=requests_per_s * sized.batch,
            requests_per_s=requests_per_s,
            device_mean_ms=float(device.mean()) if len(device) else None,
            device_p50_ms=float(np.median(device)) if len(device) else None,
            device_p99_ms=float(np.percentile(device, 99)) if len(device) else None,
            speed_up=self._ratio(name, self._baseline, active),
            against_sibling=self._ratio(name, self._siblings.get(name), active),
            gpu_utilization_percent=use.utilization_percent,
            gpu_memory_bytes=self._memory[name] or None,
            sm_clock_mhz=use.sm_clock_mhz,
            steady=slices.steady,
        )

    def _ratio(self, name: str, other: str | None, active: Mapping[str, Slices]) -> SpeedUp | None:
        if other is None or other == name or other not in active:
            return None
        return speed_up(other, active[other].round_medians(), active[name].round_medians(), self._settings.seed)

    @contextlib.contextmanager
    def _skipping(self, name: str, sized: SizedInputs | None = None) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            self.skipped[f"{name} {_text(sized.sizes) if sized else ''}".strip()] = str(error) or type(error).__name__

    @contextlib.contextmanager
    def _counting_memory(self, name: str) -> Iterator[None]:
        before = self._gpu.memory_bytes() or 0
        yield
        added = (self._gpu.memory_bytes() or 0) - before
        self._memory[name] = self._memory.get(name, 0) + max(0, added)


def _text(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in sizes.items())
