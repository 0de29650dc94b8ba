"""The largest batch that runs: doubled until one does not, then bisected. And which of them are worth timing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

RESOLUTION = 32
"""The bisection ends within this part of the largest batch; what is free changes by more from run to run."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """What became of one batch size.

    Attributes:
        reason: why it does not fit.
        ms: time of a warm call.
        memory_bytes: what it takes, of the device or, on a CPU, of the whole process at its peak.
    """

    batch: int
    fits: bool
    reason: str = ""
    ms: float | None = None
    memory_bytes: int | None = None


def doubling(smallest: int, limit: int, *known: int) -> list[int]:
    """The smallest, the powers of two beyond, the limit, and what else is `known` to lie between; ascending."""
    powers = (1 << exponent for exponent in range(limit.bit_length()))
    return sorted({smallest, limit, *(size for size in (*powers, *known) if smallest < size < limit)})


def find_largest(probe: Callable[[int], Probe], sizes: Sequence[int]) -> dict[int, Probe]:
    """Probes ascending sizes until one does not fit, then between the last two; all probes by batch."""
    probes: dict[int, Probe] = {}
    for size in sizes:
        probes[size] = probe(size)
        if not probes[size].fits:
            break
    fitting, failing = largest(probes), next((size for size, found in probes.items() if not found.fits), None)
    while fitting and failing is not None and failing - fitting > max(1, fitting // RESOLUTION):
        middle = (fitting + failing) // 2
        probes[middle] = probe(middle)
        if probes[middle].fits:
            fitting = middle
        else:
            failing = middle
    return probes


def largest(probes: Mapping[int, Probe]) -> int:
    """The largest size that fits; 0 where none does."""
    return max((size for size, found in probes.items() if found.fits), default=0)


def worth_timing(probes: Mapping[int, Probe], sizes: Sequence[int]) -> list[int]:
    """Those of `sizes` that fit, and the largest that does."""
    chosen = {size for size in sizes if size in probes and probes[size].fits}
    return sorted(chosen | ({largest(probes)} - {0}))


def groups(sizes: Sequence[int], probes: Mapping[int, Probe], room_bytes: int) -> list[list[int]]:
    """Cuts ascending sizes into groups that fit in memory side by side.

    Args:
        room_bytes: what may be taken beyond what the smallest batch takes.
    """
    base = min((found.memory_bytes or 0 for found in probes.values() if found.fits), default=0)
    result: list[list[int]] = []
    taken = 0
    for size in sizes:
        above = (probes[other] for other in sorted(probes) if other >= size and probes[other].fits)
        needed = max(0, next((found.memory_bytes or 0 for found in above), 0) - base)
        if not result or taken + needed > room_bytes:
            result.append([])
            taken = 0
        result[-1].append(size)
        taken += needed
    return result
