"""Holds estimates against what the ladder measured of the same step."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..manifest import Action, Ladder, LadderStep

RUNGS = {"--align": "alignment", "--prune": "pruning", "--sparsify": "sparsity"}
LOWERING = ("precision", "quantization", "mixed precision")


def compared(actions: Sequence[Action], ladder: Ladder, target: str, engine: str = "") -> tuple[list[Action], str]:
    """The actions with what was found, and a sentence on how good the estimates were.

    Args:
        target: of the engine that they are for.
        engine: its name: only steps that were raced against it say whether an estimate was right.
    """
    told: list[Action] = []
    pairs: list[tuple[float, float]] = []
    for action in actions:
        step = step_of(action["action"], ladder, target)
        if step is None:
            told.append(action)
            continue
        saved_ms = _saved_ms(step)
        told.append(Action(**{**action, "found": _in_words(step, saved_ms), "found_ms": saved_ms}))
        if saved_ms is not None and step["ratio"] and step["ratio"]["against"] == engine:
            pairs.append((action["saves_ms"], saved_ms))
    return told, _summary(pairs)


def step_of(text: str, ladder: Ladder, target: str) -> LadderStep | None:
    """The step of the ladder that did what an action says; the one that was measured, if any."""
    named = re.search(r"--target ([\w-]+)(?::(\w+)=(\w+))?", text)
    wanted = named.group(1) if named else target
    steps = [step for step in ladder["steps"] if step["target"] == wanted]
    if found := re.search(r"--precision ([\w-]+)", text):
        steps = [s for s in steps if s["step"] in LOWERING and s["what"].split()[:1] == [found.group(1)]]
    elif rung := next((rung for option, rung in RUNGS.items() if text.startswith(option)), None):
        steps = [step for step in steps if step["step"] == rung]
    elif found := re.search(r"--pass ([\w-]+)", text):
        name = found.group(1)
        steps = [s for s in steps if any(word.partition(":")[0] == name for word in s["what"].split())]
    elif named and named.group(2):
        steps = _of_option(steps, named.group(2), f"{named.group(2)}={named.group(3)}".lower())
    else:
        return None
    return max(steps, key=lambda step: step["ratio"] is not None, default=None)


def _of_option(steps: Sequence[LadderStep], name: str, wanted: str) -> list[LadderStep]:
    """The steps that tried an option's value; else those that found another value of it to be better."""
    exact = [step for step in steps if wanted in step["what"].lower().split()]
    others = [s for s in steps if s["status"] == "kept" and any(w.startswith(f"{name}=") for w in s["what"].split())]
    return exact or others


def _saved_ms(step: LadderStep) -> float | None:
    """What a step saved of a call: its own time is the incumbent's, divided by the ratio."""
    if step["ratio"] is None or step["p50_ms"] is None:
        return None
    return step["p50_ms"] * (step["ratio"]["ratio"] - 1)


def _in_words(step: LadderStep, saved_ms: float | None) -> str:
    ratio = step["ratio"]
    if ratio is None or saved_ms is None:
        return f"{step['status']}: {step['reason']}" if step["reason"] else step["status"]
    what = f"{step['what']} " if "=" in step["what"].partition(":")[0] else ""
    verb = "saved" if saved_ms >= 0 else "cost"
    interval = f"{ratio['ratio']:.2f} times as fast as {ratio['against']}, {ratio['low']:.2f} to {ratio['high']:.2f}"
    return f"{what}{step['status']}: {verb} {abs(saved_ms):.3g} ms ({interval})"


def _summary(pairs: Sequence[tuple[float, float]]) -> str:
    if not pairs:
        return ""
    right = sum(found > 0 for _, found in pairs)
    estimated, measured = (sum(values) for values in zip(*pairs, strict=True))
    one = len(pairs) == 1
    return (
        f"the ladder checked {len(pairs)} estimate{'' if one else 's'} against this engine: {right} of them saved "
        f"time; estimated {estimated:.3g} ms in all, measured {measured:.3g} ms"
    )
