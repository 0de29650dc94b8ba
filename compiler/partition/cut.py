"""Where to cut a line of nodes: dynamic programming over positions.

    bottleneck(p1 < p2 < ...)   the time of the slowest stage, or of the slowest passing, as they overlap
    least                       the smallest bottleneck of all cuts whose stages fit in memory
    chosen                      of the cuts with a bottleneck up to (1 + slack) least, the one over which the fewest
                                bytes pass

Both are found stage by stage: f(s, p) = min over q < p of max(f(s - 1, q), time of q..p), and the same with sums.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from ...errors import GraphError
from .line import Line


@dataclasses.dataclass(frozen=True)
class Piece:
    """One stage of a cut.

    Attributes:
        nodes: first place, and the place behind the last.
        ms: of one call, without what it sends.
        memory_bytes: of weights, and of activations at most.
        sent_bytes: what passes to the next stage.
        sent: names of the tensors that pass.
    """

    nodes: tuple[int, int]
    ms: float
    memory_bytes: int
    sent_bytes: int
    sent: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What cuts have to keep.

    Attributes:
        memory_bytes: of a stage; None for no limit.
        slack: share by which a stage may be slower than the best cut's slowest, where fewer bytes pass.
        link_bytes_ms: bytes that pass in a millisecond; None where passing takes no time.
        avoided: positions within what the runtime computes as one; cut at only where nothing else is possible.
    """

    memory_bytes: int | None = None
    slack: float = 0.05
    link_bytes_ms: float | None = None
    avoided: frozenset[int] = frozenset()


def choose(line: Line, times_ms: Sequence[float], stages: int, limits: Limits) -> list[Piece]:
    """The best cut into that many stages.

    Args:
        times_ms: of each node.

    Raises:
        GraphError: there are not so many places to cut at, or the stages do not fit.
    """
    if limits.avoided:
        with contextlib.suppress(GraphError):
            return _choose(line, times_ms, stages, limits)
    return _choose(line, times_ms, stages, dataclasses.replace(limits, avoided=frozenset()))


def _choose(line: Line, times_ms: Sequence[float], stages: int, limits: Limits) -> list[Piece]:
    measure = _Measure(line, np.asarray(times_ms, float), limits)
    open_places = np.flatnonzero(np.isfinite(measure.sent)[1 : len(line)]) + 1
    if stages - 1 > len(open_places):
        reasons = list(dict.fromkeys(crossing.reason for crossing in line.crossings if crossing.reason))
        raise GraphError(
            f"the graph cannot be cut into {stages} stages",
            expected=f"at most {len(open_places) + 1} of {len(line)} nodes",
            found="; ".join(reasons[:3]) or f"{len(line)} nodes in a row",
            hint="ask for fewer stages",
        )
    least = _solve(measure, stages, math.inf)[1]
    if not math.isfinite(least):
        needed = measure.memory_needed(stages)
        raise GraphError(
            f"no cut into {stages} stages fits in memory",
            expected=f"at most {(limits.memory_bytes or 0) / 2**20:.0f} MiB of weights and activations in each stage",
            found=f"{needed / 2**20:.0f} MiB in the largest stage of the cut that needs the least",
            hint="ask for more stages, or for a smaller batch",
        )
    places = _solve(measure, stages, least * (1 + limits.slack) + 1e-12)[0]
    return [measure.piece(first, end) for first, end in zip([0, *places], [*places, len(line)], strict=True)]


class _Measure:
    """Time, memory and bytes of all stages that end at a position, as vectors over where they begin."""

    def __init__(self, line: Line, times_ms: np.ndarray, limits: Limits) -> None:
        self.line, self.limits = line, limits
        count = len(line)
        self._until = np.concatenate([[0.0], np.cumsum(times_ms)])
        self.sent = np.zeros(count + 1)
        self._alive = np.zeros(count)
        for crossing in line.crossings:
            size = math.inf if crossing.reason else float(crossing.size_bytes or 0)
            self.sent[crossing.first + 1 : crossing.last + 1] += size
            self._alive[max(crossing.first, 0) : crossing.last + 1] += float(crossing.size_bytes or 0)
        self.sent[[0, *limits.avoided]] = [0.0, *(math.inf for _ in limits.avoided)]
        self._memory = self._memories() if count else []

    def stage_ms(self, end: int) -> np.ndarray:
        """Of the stages q..end for q < end; infinite where one does not fit."""
        sending = 0.0 if self.limits.link_bytes_ms is None or end == len(self.line) else self.sent[end]
        times = np.maximum(self._until[end] - self._until[:end], sending / (self.limits.link_bytes_ms or 1.0))
        if self.limits.memory_bytes is not None:
            times = np.where(self._memory[end] <= self.limits.memory_bytes, times, math.inf)
        return np.asarray(times)

    def memory(self, end: int) -> np.ndarray:
        """Bytes of the stages q..end."""
        return self._memory[end]

    def memory_needed(self, stages: int) -> float:
        """Bytes of the largest stage where it is as small as can be."""
        best = np.concatenate([[0.0], np.full(len(self.line), math.inf)])
        for _ in range(stages):
            longer = np.full(len(self.line) + 1, math.inf)
            for end in range(1, len(self.line) + 1):
                if math.isfinite(self.sent[end]) or end == len(self.line):
                    longer[end] = np.maximum(best[:end], self._memory[end]).min()
            best = longer
        return float(best[-1])

    def piece(self, first: int, end: int) -> Piece:
        passing = [c for c in self.line.crossings if c.first < end <= c.last] if end < len(self.line) else []
        return Piece(
            nodes=(first, end),
            ms=float(self._until[end] - self._until[first]),
            memory_bytes=int(self._memory[end][first]),
            sent_bytes=sum(c.size_bytes or 0 for c in passing),
            sent=tuple(c.name for c in passing),
        )

    def _memories(self) -> list[np.ndarray]:
        """By the end of a stage: weights count once in each stage that reads them, activations at their peak."""
        count = len(self.line)
        uses: list[list[tuple[int, int]]] = [[] for _ in range(count)]
        for weight in self.line.weights:
            before = -1
            for place in weight.places:
                uses[place].append((before, weight.size_bytes))
                before = place
        found = [np.zeros(0)]
        weights, peak = np.zeros(count), np.zeros(count)
        for place in range(count):
            for before, size in uses[place]:
                weights[before + 1 : place + 1] += size
            peak[: place + 1] = np.maximum(peak[: place + 1], self._alive[place])
            found.append(weights[: place + 1] + peak[: place + 1])
        return found


def _solve(measure: _Measure, stages: int, bound_ms: float) -> tuple[list[int], float]:
    """The places of the best cut and its value: the bottleneck, or the bytes where there is a bound."""
    count = len(measure.line)
    seeking = not math.isfinite(bound_ms)
    best = np.concatenate([[0.0], np.full(count, math.inf)])
    came = np.zeros((stages, count + 1), int)
    for stage in range(stages):
        longer = np.full(count + 1, math.inf)
        for end in range(stage + 1, count + 1):
            if end < count and not math.isfinite(measure.sent[end]):
                continue
            times = measure.stage_ms(end)
            if seeking:
                values = np.maximum(best[:end], times)
            else:
                values = np.where(times <= bound_ms, best[:end], math.inf) + (measure.sent[end] if end < count else 0.0)
            came[stage, end] = int(values.argmin())
            longer[end] = values[came[stage, end]]
        best = longer
    places, end = [], count
    for stage in range(stages - 1, 0, -1):
        end = int(came[stage, end])
        places.append(end)
    return places[::-1], float(best[count])
