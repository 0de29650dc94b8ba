"""The ladder as a waterfall: each step starts where the engine that it was raced against stands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..manifest import Ladder, LadderStep
from .figures import FULL, SLIVER, Bar, Chart
from .numbers import TIMES, number, ratio

WORDS: Mapping[str, str] = {
    "start": "start",
    "kept": "kept",
    "reverted": "reverted",
    "failed": "failed",
    "skipped": "left out",
    "not measured": "not measured",
}


def by_target(ladder: Ladder) -> dict[str, list[LadderStep]]:
    """The steps of each target, in the order in which they were tried."""
    found: dict[str, list[LadderStep]] = {}
    for step in ladder["steps"]:
        found.setdefault(step["target"], []).append(step)
    return found


def waterfall(steps: Sequence[LadderStep]) -> Chart | None:
    """Gains over the first engine, multiplied up; None where nothing was raced."""
    rows: list[tuple[LadderStep, float, float, float, float]] = []
    level = base = 1.0
    rung = ""
    for step in steps:
        gain = step["ratio"]
        if step["step"] != rung:  # all candidates of a rung were raced against the same engine
            rung, base = step["step"], level
        if step["status"] == "start":
            rows.append((step, 0.0, 1.0, 1.0, 1.0))
        elif gain is not None and math.isfinite(gain["ratio"] + gain["low"] + gain["high"]):
            rows.append((step, base, base * gain["ratio"], base * gain["low"], base * gain["high"]))
            level = base * gain["ratio"] if step["status"] == "kept" else level
    if len(rows) < 2:
        return None
    scale = FULL / max(high for *_, high in rows)
    bars = tuple(_bar(step, before, after, low, high, scale) for step, before, after, low, high in rows)
    return Chart("Gain over the captured graph, step by step; hollow steps were reverted", bars, round(scale, 2))


def _bar(step: LadderStep, before: float, after: float, low: float, high: float, scale: float) -> Bar:
    gain = step["ratio"]
    raced = step["status"] != "start"
    left, right = sorted((before, after))
    interval = f"{ratio(gain['low'])} to {ratio(gain['high'])}" if gain else ""
    notes = (WORDS[step["status"]], interval, f"{number(step['p50_ms'])} ms" if step["p50_ms"] else "")
    return Bar(
        label=step["step"] if step["what"] in ("", step["step"]) else f"{step['step']}: {step['what']}",
        value=ratio(gain["ratio"]) if gain else f"1{TIMES}",
        note=" · ".join(filter(None, notes)),
        tone="best" if step["status"] == "kept" else "wrong" if raced else "baseline",
        start=round(left * scale, 2),
        width=max(SLIVER, round((right - left) * scale, 2)),
        low=round(low * scale, 2) if raced else None,
        high=round(high * scale, 2) if raced else None,
    )


def sentence(target: str, steps: Sequence[LadderStep], pick: str | None) -> str:
    """What came of a target, in words."""
    tried = [step for step in steps if step["status"] in ("kept", "reverted", "failed", "not measured")]
    kept = [step for step in tried if step["status"] in ("kept", "not measured")]
    if pick is None:
        reason = next((step["reason"] for step in steps if step["status"] == "failed"), "")
        return f"{target}: no engine" + (f"; {reason}" if reason else "")
    gains = [step["ratio"]["ratio"] for step in kept if step["ratio"]]
    total = math.prod(gains)
    pace = f", {ratio(total)} the captured graph" if gains and steps[0]["p50_ms"] else ""
    return f"{target}: {pick}{pace}; {len(kept)} of {len(tried)} steps kept"
