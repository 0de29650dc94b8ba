"""Which engines are better: by what they were compiled for, which is their latency where nothing else was asked for.

latency       p50 at the usual sizes
throughput    p50 at the largest batch
size          the bytes of the files, and of a decoder the caches of all rows that it takes; then latency
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .ladder.objective import LATENCY, Objective, held_bytes
from .manifest import Benchmark, EngineRecord, Ladder, Timing
from .signature import Signature

_UNKNOWN = float("inf")


class Rank(NamedTuple):
    """What an engine is ranked by; the lowest is the best. Infinite where it is not known."""

    size_bytes: float
    p50_ms: float


def objective_of(ladder: Ladder | None) -> Objective:
    """What the engines of a bundle were compiled for."""
    return Objective.parse(ladder["objective"]) if ladder else LATENCY


def decisive(benchmark: Benchmark | None, signature: Signature, objective: Objective) -> dict[str, Timing]:
    """By candidate the timings that decide: at the objective's sizes, or at the usual ones where there are none."""
    timings = benchmark["timings"] if benchmark else []
    for sizes in (objective.sizes(signature), signature.sizes()):
        if found := {t["candidate"]: t for t in timings if sizes.items() >= t["sizes"].items()}:
            return found
    return {}


def ranks(
    engines: Sequence[EngineRecord], benchmark: Benchmark | None, signature: Signature, objective: Objective
) -> dict[str, Rank]:
    """Of each engine what it is ranked by."""
    timings = decisive(benchmark, signature, objective)
    found = {}
    for engine in engines:
        size = 0.0
        if objective.kind == "size":
            size = held_bytes(engine, signature) if engine["size_bytes"] else _UNKNOWN
        timing = timings.get(engine["name"])
        found[engine["name"]] = Rank(size, timing["p50_ms"] if timing else _UNKNOWN)
    return found
