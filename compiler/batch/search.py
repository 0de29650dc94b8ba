"""The batch search of engines: probe sizes up to where memory ends, time them side by side, and decide."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import RecipeError
from ...targets import get_target
from ...targets.base import EngineInfo
from ..engine import by_merit
from ..ladder.objective import Objective
from ..machine.requirements import devices
from ..manifest import BatchCurve, BatchPoint, Benchmark, EngineRecord
from ..recipe import Recipe
from ..signature import Signature
from . import choice
from .largest import Probe, doubling, find_largest, groups, largest, worth_timing
from .latency import parse_latency
from .processes import Processes, Subject

PLANNED_CALLS = choice.CALLS * 5 // 4
"""Calls that a size is given time for; a slice may end early."""

CALLS_S = 60.0
"""Time that the sizes share for these calls; the slowest come short where it does not suffice."""

FAR = 3
"""Sizes whose calls take this multiple of the limit on p99 miss it in any case, and need no exact one."""

PROBING = 0.4
"""Share of the work that goes into probing, for the progress."""

Update = Callable[[float, str], None]


def search_batches(
    folder: Path,
    engines: Sequence[EngineRecord],
    sample: Mapping[str, np.ndarray],
    signature: Signature,
    recipe: Recipe,
    update: Update,
    *,
    limit_bytes: int | None = None,
) -> list[BatchCurve]:
    """Searches the batch sizes of each engine that runs here.

    Args:
        folder: the bundle, or what becomes it.
        sample: inputs that batches are made of, by repeating.
        limit_bytes: memory that a batch may take on a CPU; None for what is free.

    Raises:
        RecipeError: nothing can be searched: see `check_searchable`.
    """
    axis, limit = check_searchable(signature, recipe)
    ready = [engine for engine in engines if engine["status"] == "ready"]
    curves = []
    with tempfile.TemporaryDirectory(prefix="enginesmith-") as scratch:
        file = Path(scratch) / "sample.npz"
        np.savez(file, **sample)  # type: ignore[arg-type]  # it takes arrays by name
        for number, engine in enumerate(ready):
            directory = folder / "engines" / engine["name"]
            info = EngineInfo.read(directory)
            subject = Subject(
                directory,
                file,
                {name: size for name, size in signature.sizes().items() if name != axis},
                axis,
                on_gpu="cuda" in devices(info, get_target(info.target, info.options)),
                limit_bytes=limit_bytes,
            )

            def told(fraction: float, what: str, number: int = number, name: str = engine["name"]) -> None:
                update((number + fraction) / len(ready), f"{name}: {what}")

            with Processes(subject) as processes:
                curves.append(_search(engine["name"], subject, processes, signature, limit, recipe, told))
    return curves


def check_searchable(signature: Signature, recipe: Recipe) -> tuple[str, int]:
    """The batch axis, and the largest size to look for.

    Raises:
        RecipeError: no batch axis, one of a single size, or a largest batch that is below its smallest.
    """
    axis = signature.batch_axis
    hint = f"compile with --dynamic {signature.inputs[0].name}:0=1..8..64" if signature.inputs else None
    if axis is None:
        raise RecipeError(
            "there is no batch size to search: no input has a dynamic first axis",
            expected="an input whose first axis is dynamic",
            found=", ".join(map(str, signature.inputs)),
            hint=hint,
        )
    sizes, limit = signature.axes[axis], recipe.max_batch or signature.axes[axis].max
    if limit < sizes.min:
        raise RecipeError(
            "the largest batch to search is below the smallest of the axis",
            expected=f"max_batch of {sizes.min} or more",
            found=limit,
        )
    if limit == sizes.min:
        raise RecipeError(
            f"there is no batch size to search: axis {axis!r} has the one size {limit}", found=sizes, hint=hint
        )
    return axis, limit


def best_of_targets(
    engines: Sequence[EngineRecord], benchmark: Benchmark | None, signature: Signature, objective: Objective
) -> list[EngineRecord]:
    """The engine of each target that would be chosen: the best that runs here, is right and was not dropped."""
    chosen: dict[str, EngineRecord] = {}
    for engine in by_merit(engines, benchmark, signature, objective):
        if engine["status"] == "ready":
            chosen.setdefault(engine["target"], engine)
    return list(chosen.values())


def notes(curves: Sequence[BatchCurve]) -> list[str]:
    """What should be known of the search and is no failure by itself."""
    found = []
    for curve in curves:
        if not curve["largest"]:
            found.append(f"{curve['engine']} runs at no batch size that was searched: {curve['points'][0]['reason']}")
        elif curve["p99_limit_ms"] is not None and curve["best"] is None and not choice.missed(curves):
            found.append(f"{curve['engine']}: {choice.unmet(curve)}")
    return found


@dataclasses.dataclass(frozen=True)
class _Timed:
    """Timings by batch, and why others have none."""

    timings: Mapping[int, Mapping[str, Any]]
    skipped: Mapping[int, str]

    def with_later(self, later: _Timed) -> _Timed:
        """Both; what was timed again counts as it was then, beside what it has to be compared with."""
        return _Timed({**self.timings, **later.timings}, {**self.skipped, **later.skipped})


def _search(
    name: str, subject: Subject, processes: Processes, signature: Signature, limit: int, recipe: Recipe, update: Update
) -> BatchCurve:
    axis = signature.axes[subject.axis]
    known = min(axis.opt, limit)

    sizes = doubling(axis.min, limit, axis.opt, axis.max)
    fractions = itertools.chain(
        (PROBING * number / len(sizes) for number in range(len(sizes))), itertools.repeat(PROBING)
    )

    def probe(batch: int) -> Probe:
        update(next(fractions), f"try batch {batch}")
        return processes.probe(batch, alone=batch > known)

    probes = find_largest(probe, sizes)
    p99_limit_ms = None if recipe.p99 is None else parse_latency(recipe.p99)
    timed = _Timed({}, {})
    if chosen := worth_timing(probes, sizes):
        update(PROBING, f"time {len(chosen)} batch sizes")
        timed = _time(processes, chosen, probes, p99_limit_ms, recipe)
        if again := choice.refinements(_points(probes, timed), p99_limit_ms):
            update(0.8, f"time {len(again)} batch sizes")
            timed = timed.with_later(_time(processes, again, probes, p99_limit_ms, recipe))
    points = _points(probes, timed)
    return BatchCurve(
        engine=name,
        axis=subject.axis,
        sizes=dict(subject.sizes),
        device="cuda" if subject.on_gpu else "cpu",
        points=points,
        largest=largest(probes),
        largest_is_limit=largest(probes) == limit,
        saturation=choice.saturation(points),
        best=choice.best(points, p99_limit_ms),
        p99_limit_ms=p99_limit_ms,
        protocol=_protocol(recipe),
    )


def _time(
    processes: Processes, sizes: Sequence[int], probes: Mapping[int, Probe], p99_limit_ms: float | None, recipe: Recipe
) -> _Timed:
    """Times sizes side by side, as many together as fit in memory."""
    settings = {"rounds": recipe.rounds, "slice_s": recipe.slice_s}
    settings |= {"transfers": recipe.with_transfers, "seed": recipe.seed}
    wanted_s = _wanted_s({size: _about_ms(size, probes) for size in sizes}, p99_limit_ms)
    timings: dict[int, Mapping[str, Any]] = {}
    skipped: dict[int, str] = {}
    for group in groups(sizes, probes, processes.room_bytes()):
        slices_s = {size: max(recipe.slice_s, wanted_s[size] / recipe.rounds) for size in group}
        found, failed = processes.time(slices_s, settings)
        timings.update(found)
        skipped.update(failed)
    return _Timed(timings, skipped)


def _about_ms(size: int, probes: Mapping[int, Probe]) -> float:
    """What a call takes, by the probe of that size or of the next larger one."""
    above = (probes[other].ms for other in sorted(probes) if other >= size and probes[other].fits)
    return next((ms for ms in above if ms is not None), 0.0)


def _wanted_s(calls_ms: Mapping[int, float], p99_limit_ms: float | None) -> dict[int, float]:
    """Seconds for each size to come to the calls that a p99 needs, within `CALLS_S` for all: the fastest first."""
    wanted_s = {}
    left_s = CALLS_S
    for number, (size, ms) in enumerate(sorted(calls_ms.items(), key=lambda item: item[1])):
        far = p99_limit_ms is not None and ms > FAR * p99_limit_ms
        wanted_s[size] = 0.0 if far else min(PLANNED_CALLS * ms / 1e3, left_s / (len(calls_ms) - number))
        left_s -= wanted_s[size]
    return wanted_s


def _points(probes: Mapping[int, Probe], timed: _Timed) -> list[BatchPoint]:
    points = []
    for batch in sorted({*probes, *timed.timings}):
        probe, timing = probes.get(batch), timed.timings.get(batch)
        points.append(
            BatchPoint(
                batch=batch,
                fits=probe is None or probe.fits,
                reason=probe.reason if probe and not probe.fits else "" if timing else timed.skipped.get(batch, ""),
                p50_ms=timing["p50_ms"] if timing else None,
                p99_ms=timing["p99_ms"] if timing else None,
                samples_per_s=1000 * batch / timing["p50_ms"] if timing else None,
                calls=timing["iterations"] if timing else 0,
                memory_bytes=probe.memory_bytes if probe else None,
                gpu_utilization_percent=timing["gpu_utilization_percent"] if timing else None,
            )
        )
    return points


def _protocol(recipe: Recipe) -> str:
    where = "with transfers from and to NumPy arrays" if recipe.with_transfers else "inputs already on the device"
    return (
        f"Sizes were tried in processes of their own, then timed interleaved: {recipe.rounds} rounds in random order, "
        f"{where}, each size for {recipe.slice_s:g} s a round, or longer to come to {choice.CALLS} calls, for which "
        f"{CALLS_S:g} s are shared. Throughput is of the median call."
    )
