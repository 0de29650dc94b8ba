"""What a row is to reach, and whether it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpu.own import LOSSY_BUDGET, OWN, ROWS_IN_INT8
from gpu.row import FP16_BUDGET

EAGER = "torch fp32"
LOSSY_GAIN = 1.3
EAGER_GAIN = 5.0

Candidates = Sequence[Mapping[str, Any]]


def fastest(candidates: Candidates, *, own: bool, budget: float) -> str | None:
    """The fastest candidate within a bound on the error, ours or a peer, by the median time on the host."""
    right = [
        candidate
        for candidate in candidates
        if candidate["name"].startswith(OWN) == own
        and candidate["relative_l2"] is not None
        and candidate["relative_l2"] <= budget
    ]
    return min(right, key=lambda candidate: candidate["p50_ms"])["name"] if right else None


def duellists(candidates: Candidates, row: str) -> dict[str, str]:
    """Who is to be measured again, side by side: the best peer, our pick, and the one in INT8 where that has a goal."""
    found = {
        "peer": fastest(candidates, own=False, budget=FP16_BUDGET),
        "pick": fastest(candidates, own=True, budget=FP16_BUDGET),
        "int8": fastest(candidates, own=True, budget=LOSSY_BUDGET) if row in ROWS_IN_INT8 else None,
    }
    return {role: name for role, name in found.items() if name}


def goals(row: str, roles: Mapping[str, str], ratios: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Each goal with what was measured; `reached` where the whole 95 % interval is beyond it.

    Args:
        row: name of the row.
        roles: what `duellists` found.
        ratios: of the best peer's time to each candidate's, and under "eager" of torch's in fp32 to the pick's.
    """
    pick, peer = roles.get("pick"), roles.get("peer")
    found = {
        "fastest of all": _goal(f"{pick} against {peer}", ratios.get(pick or ""), 1.0),
        f"{EAGER_GAIN:g} times torch eager fp32": _goal(f"{pick} against {EAGER}", ratios.get("eager"), EAGER_GAIN),
    }
    if row in ROWS_IN_INT8:
        own = roles.get("int8")
        what = f"{LOSSY_GAIN:g} times the best peer at relative L2 {LOSSY_BUDGET:g}"
        found[what] = _goal(f"{own} against {peer}", ratios.get(own or ""), LOSSY_GAIN)
    return found


def _goal(what: str, ratio: Mapping[str, float] | None, bound: float) -> dict[str, Any]:
    reached = ratio is not None and ratio["low"] > bound
    return {"what": what, "ratio": ratio and dict(ratio), "bound": bound, "reached": reached}
