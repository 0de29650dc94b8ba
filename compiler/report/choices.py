"""What one could have had: engines and trials by latency and error, and which of them no other one beats in both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from ..manifest import EngineRecord, LadderStep, Manifest, Validation
from ..ranking import objective_of
from ..signature import Signature
from .numbers import positive
from .search import Climb, climbs, what_of

State = Literal["picked", "on the front", "beaten", "not close enough"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """An engine of the bundle, or a trial of the ladder. `number` counts those that were timed, the fastest first."""

    name: str
    p50_ms: float
    error: float
    state: State
    front: bool = False
    number: int = 0


@dataclasses.dataclass(frozen=True)
class Choices:
    """All choices at one size of the dynamic axes, in words `where`.

    Attributes:
        untimed: judged, but not timed; their latency is infinite.
        budget: as the user gave it, empty where there is none.
        bound: of the budget, where it is on the error that is shown.
        baseline_ms: of the benchmark's baseline, None where it was not timed.
    """

    timed: tuple[Choice, ...]
    untimed: tuple[Choice, ...]
    where: str
    budget: str
    bound: float | None
    baseline: str
    baseline_ms: float | None


def choices(manifest: Manifest) -> Choices:
    """Collects them from the benchmark and the ladder, each once."""
    sizes, benchmark, ladder = _sizes(manifest), manifest["benchmark"], manifest.get("ladder")
    times = {t["candidate"]: t["p50_ms"] for t in (benchmark["timings"] if benchmark else ()) if t["sizes"] == sizes}
    trials = [(climb, tried.step) for climb in (climbs(ladder) if ladder else ()) for tried in climb.tried]
    owners = [_engine_of(climb, step, manifest["engines"]) for climb, step in trials]
    for owner, (_, step) in zip(owners, trials, strict=True):
        if owner and step["p50_ms"] is not None:
            times.setdefault(owner, step["p50_ms"])
    others = [_trial(*trial) for trial, owner in zip(trials, owners, strict=True) if owner is None]
    found = [choice for choice in (*_engines(manifest, times), *others) if choice and math.isfinite(choice.error)]
    found.sort(key=lambda choice: (choice.p50_ms, choice.error))
    budget = _budget(manifest)
    kind, _, bound = budget.partition("=")
    baseline = benchmark["baseline"] if benchmark else ""
    return Choices(
        timed=_ranked([choice for choice in found if math.isfinite(choice.p50_ms)]),
        untimed=tuple(choice for choice in found if not math.isfinite(choice.p50_ms)),
        where="".join(f", {axis} {size}" for axis, size in sizes.items()).replace(",", " at", 1),
        budget=budget,
        bound=float(bound) if kind == "relative_l2" else None,
        baseline=baseline,
        baseline_ms=times.get(baseline),
    )


def _sizes(manifest: Manifest) -> dict[str, int]:
    """The sizes at which the ladder timed, or else those that engines are tuned for."""
    if not manifest["signature"]:
        return {}
    return objective_of(manifest.get("ladder")).sizes(Signature.from_json(manifest["signature"]))


def _engine_of(climb: Climb, step: LadderStep, engines: Sequence[EngineRecord]) -> str | None:
    """The engine of the bundle that a step made, None where it was not kept or another one took its place.

    The pick is renamed in the end, and trials that were removed leave their names to others.
    """
    staying = [tried.step for tried in climb.tried if tried.step["status"] in ("start", "kept", "not measured")]
    if staying and step is staying[-1]:
        return climb.pick
    named = any(engine["name"] == step["candidate"] for engine in engines)
    return step["candidate"] if step in staying and named and step["candidate"] != climb.pick else None


def _engines(manifest: Manifest, times: Mapping[str, float]) -> Iterator[Choice]:
    ladder, best = manifest.get("ladder"), manifest["verdict"].get("best")
    picks = ladder["picks"].values() if ladder else (best,)
    for engine in manifest["engines"]:
        if validation := engine["validation"]:
            state: State = "picked" if engine["name"] in picks and not engine["dropped"] else "beaten"
            state = state if validation["passed"] else "not close enough"
            yield Choice(engine["name"], _time(times.get(engine["name"])), _worst(validation), state)


def _trial(climb: Climb, step: LadderStep) -> Choice | None:
    if step["relative_l2"] is None:
        return None
    name = " ".join(
        filter(None, (f"{climb.target}, {step['step']}", "" if step["status"] == "start" else what_of(step)))
    )
    # What is not close enough is not raced.
    wrong = step["status"] == "reverted" and step["ratio"] is None
    return Choice(name, _time(step["p50_ms"]), step["relative_l2"], "not close enough" if wrong else "beaten")


def _time(p50_ms: float | None) -> float:
    return positive(p50_ms) or math.inf


def _worst(validation: Validation) -> float:
    """The largest error of the outputs; NaN where one has none."""
    errors = [output["relative_l2"] for output in validation["outputs"]]
    known = [error for error in errors if error is not None and math.isfinite(error)]
    return max(known) if known and len(known) == len(errors) else math.nan


def _ranked(timed: Sequence[Choice]) -> tuple[Choice, ...]:
    """Numbers them, and tells the front: each that is close enough, and closer than all faster ones that are."""
    ranked, least = [], math.inf
    for number, choice in enumerate(timed, start=1):
        front = choice.state != "not close enough" and choice.error < least
        least = choice.error if front else least
        state: State = "on the front" if front and choice.state == "beaten" else choice.state
        ranked.append(dataclasses.replace(choice, state=state, front=front, number=number))
    return tuple(ranked)


def _budget(manifest: Manifest) -> str:
    """The budget that the user gave, as engines and trials were judged by it."""
    ladder = manifest.get("ladder")
    judged = [step["budget"] for step in (ladder["steps"] if ladder else ())]
    judged += [engine["validation"]["budget"] for engine in manifest["engines"] if engine["validation"]]
    return next((record["text"] for record in judged if record), "")
