"""What the ladder did on each target, in the order in which a reader follows it, with levels and words."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from ..gains import FASTER
from ..manifest import Ladder, LadderStep, SpeedUp
from .numbers import TIMES, positive, ratio

TRIED = ("kept", "reverted", "failed", "not measured")
"""States of steps that were built, or were to be."""

TOTALS: Mapping[str, str] = {
    "latency": "{} the speed of the captured graph",
    "throughput": "{} the throughput of the captured graph",
    "size": "{} smaller than the captured graph",
}


@dataclasses.dataclass(frozen=True)
class Tried:
    """One step. `gain` is over the engine that it was raced against, None where it was not, and `before` is the gain of
    that engine over the first one; `after`, `low` and `high` are its own over the first one, with the 95 % interval.
    `verdict` is what became of it, in a few words.
    """

    step: LadderStep
    gain: SpeedUp | None
    before: float
    after: float | None
    low: float | None
    high: float | None
    verdict: str

    @property
    def stays(self) -> bool:
        """Whether all later steps build on it."""
        return self.step["status"] in ("kept", "not measured")


@dataclasses.dataclass(frozen=True)
class Climb:
    """All steps of one target. `total` is the product of the gains that were measured and kept, None where none was."""

    target: str
    pick: str | None
    tried: tuple[Tried, ...]
    total: float | None
    sentence: str


def climbs(ladder: Ladder) -> tuple[Climb, ...]:
    """The targets in the order in which they were climbed."""
    kind = ladder["objective"].partition("=")[0]
    return tuple(_climb(steps, ladder, kind) for steps in _by_target(ladder["steps"]))


def explained(tried: Tried) -> str:
    """The reason of a step where its numbers do not tell it already."""
    plain = tried.step["status"] == "kept" and tried.gain is not None and tried.gain["low"] > FASTER
    return "" if plain else tried.step["reason"]


def what_of(step: LadderStep) -> str:
    """What a step changes; empty where its name says it."""
    return "" if step["what"] == step["step"] else step["what"]


def _by_target(steps: Sequence[LadderStep]) -> list[list[LadderStep]]:
    """A target's steps begin with a step of the same name each time, also where a target is climbed twice."""
    found: list[list[LadderStep]] = []
    for step in steps:
        first = found[-1][0] if found else None
        if first is None or step["target"] != first["target"] or step["step"] == first["step"]:
            found.append([])
        found[-1].append(step)
    return found


def _climb(steps: Sequence[LadderStep], ladder: Ladder, kind: str) -> Climb:
    target = _name(steps, ladder["picks"])
    pick = ladder["picks"].get(target)
    tried = tuple(_followed(steps, kind))
    gains = [one.gain["ratio"] for one in tried if one.stays and one.gain]
    total = math.prod(gains) if gains else None
    return Climb(target, pick, tried, total, f"{target}: {_sentence(tried, pick, total, kind)}")


def _name(steps: Sequence[LadderStep], picks: Mapping[str, str]) -> str:
    """What the picks call the target: the name of its first engine without the precision."""
    names = (step["candidate"].replace("-fp32", "") for step in steps[:2])
    return next((name for name in names if name in picks), steps[0]["target"])


def _followed(steps: Sequence[LadderStep], kind: str) -> list[Tried]:
    """The steps with their levels; of the candidates of a rung the one that stays comes last."""
    found: list[Tried] = []
    level, levels = 1.0, {steps[0]["candidate"]: 1.0}
    for _, group in itertools.groupby(steps, key=lambda step: step["step"]):
        rung = sorted(group, key=lambda step: step["status"] in ("kept", "not measured"))
        winner = next((step for step in rung if step["status"] == "kept"), None)
        for step in rung:
            gain, verdict = _gain(step), _verdict(step, winner, kind)
            if gain is None:
                found.append(Tried(step, None, level, None, None, None, verdict))
                continue
            before = levels.get(gain["against"], level)
            after, low, high = (before * value for value in (gain["ratio"], gain["low"], gain["high"]))
            found.append(Tried(step, gain, before, after, low, high, verdict))
        last = found[-1]
        if last.stays:
            level = last.after or level
            levels[last.step["candidate"]] = level
    return found


def _gain(step: LadderStep) -> SpeedUp | None:
    """What a step gained, where it was raced and all numbers of the race exist."""
    gain = step["ratio"]
    numbers = (gain["ratio"], gain["low"], gain["high"]) if gain else ()
    known = all(positive(value) for value in numbers)
    return gain if known and step["status"] != "start" else None


def _verdict(step: LadderStep, winner: LadderStep | None, kind: str) -> str:
    status, gain = step["status"], _gain(step)
    if status == "kept":
        return "kept" if gain is None or kind == "size" or gain["low"] > FASTER else "kept: later steps need it"
    if status == "reverted":
        best = _gain(winner) if winner else None
        return f"reverted: {_shortcoming(gain, best, kind) if gain else 'not close enough'}"
    return {"start": "start", "failed": "failed", "skipped": "left out", "not measured": "kept, not measured"}[status]


def _shortcoming(gain: SpeedUp, best: SpeedUp | None, kind: str) -> str:
    if best and gain["low"] > FASTER and best["ratio"] >= gain["ratio"]:
        return "another was smaller" if kind == "size" else "another was faster"
    if kind == "size":
        return "larger" if gain["ratio"] < 1 else "not smaller by enough"
    return "slower" if gain["high"] < 1 else "no clear gain"


def _sentence(tried: Sequence[Tried], pick: str | None, total: float | None, kind: str) -> str:
    asked = [one for one in tried if one.step["status"] in TRIED and one.step is not tried[0].step]
    failed = tried[0].step["status"] == "failed"
    if pick is None or failed:
        return f"no engine: {tried[0].step['reason']}" if failed else "no engine"
    kept = [one for one in asked if one.stays]
    if not asked:
        return "no step was tried"
    words = [f"{len(kept)} of {len(asked)} {'step' if len(asked) == 1 else 'steps'} kept"]
    if total is not None:
        words.append(TOTALS.get(kind, "{} the captured graph").format(ratio(total)))
    if unknown := sum(one.step["status"] == "not measured" for one in kept):
        words.append(f"{unknown} of them not measured")
    text = ", ".join(words)
    return "; ".join(filter(None, (text, _largest(kept))))


def _largest(kept: Sequence[Tried]) -> str:
    """The step that gained most, with the budget that it kept."""
    raced = [(one.gain["ratio"], one.step) for one in kept if one.gain]
    gain, step = max(raced, key=lambda pair: pair[0], default=(0.0, None))
    if step is None or gain <= FASTER or len(raced) < 2:
        return ""
    words = (what_of(step) or step["step"]).split()[0]
    budget = step["budget"]
    within = f" and stayed within {budget['text']}" if budget and budget["holds"] else ""
    return f"{words} was {ratio(gain).removesuffix(TIMES)}{TIMES}{within}"
