"""Which node makes the error of an engine's outputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ...errors import EngineError, GraphError
from .bisect import Region, bisect
from .causes import Explanation, explain
from .distance import distance, worst
from .trace import Row, Side, Tapped, trace

Arrays = Mapping[str, np.ndarray]
Update = Callable[[float, str], None]
Verdict = Literal["ok", "makes", "inherits", "unknown"]

CANDIDATES = 5
"""Nodes of the largest own errors whose effect on the outputs is measured, beside those above the threshold."""

MOST_FLAGGED = 8
SHARE = 0.25
"""Of the outputs' error: a node that causes as much by itself makes it."""


@dataclasses.dataclass(frozen=True)
class Culprit:
    """The node that makes the error.

    Attributes:
        effect: error of the outputs where this node alone is as in the engine, and all others as in the reference.
    """

    row: Row
    effect: float
    explanation: Explanation


@dataclasses.dataclass(frozen=True)
class Findings:
    """What was found on one sample.

    Attributes:
        error: of the outputs of the engine as it is.
        diverges: whether that is above the threshold.
        rows: every tensor that both graphs hold, in the order of the engine's graph.
        first: the first tensor whose total error is above the threshold.
        culprit: None where the outputs are right.
        effects: of each candidate alone, by tensor.
        region: where the error begins by bisecting; None where that was not needed, or found nothing.
        notes: what else there is to say, in sentences.
    """

    error: float
    threshold: float
    diverges: bool
    rows: tuple[Row, ...]
    first: Row | None
    culprit: Culprit | None
    effects: Mapping[str, float]
    region: Region | None
    notes: tuple[str, ...]

    def verdict(self, row: Row) -> Verdict:
        """What a node does to the error."""
        if row.local is not None and row.local.size > self.threshold:
            return "makes"
        if row.total is None:
            return "unknown"
        return "inherits" if row.total.size > self.threshold else "ok"

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite are None."""
        return {
            "error": _finite(self.error),
            "threshold": self.threshold,
            "diverges": self.diverges,
            "first": self.first and self.first.name,
            "culprit": self.culprit
            and {
                **self._row(self.culprit.row),
                "effect": _finite(self.culprit.effect),
                **dataclasses.asdict(self.culprit.explanation),
            },
            "region": self.region and {**dataclasses.asdict(self.region), "error": _finite(self.region.error)},
            "effects": {name: _finite(effect) for name, effect in self.effects.items()},
            "notes": list(self.notes),
            "rows": [self._row(row) for row in self.rows],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        main = row.segment.main
        return {
            "tensor": row.name,
            "node": main.name or "",
            "operator": f"{main.domain}::{main.op_type}" if main.domain else main.op_type,
            "dtype": row.dtype,
            "inputs": list(row.segment.leaves),
            "verdict": self.verdict(row),
            "total": row.total and dataclasses.asdict(row.total),
            "local": row.local and dataclasses.asdict(row.local),
            "reason": row.reason,
        }


def find(
    subject: Side,
    oracle: Side,
    inputs: Arrays,
    truth: Arrays,
    error: float,
    threshold: float,
    update: Update = lambda fraction, what: None,
) -> Findings:
    """Compares two graphs on one sample.

    Args:
        truth: the right outputs.
        error: of the engine's own outputs, nothing looked at.
        threshold: relative L2 above which a tensor diverges.

    Raises:
        GraphError: the graphs share no tensor.
        EngineError: the reference's side cannot run.
    """
    rows, taps = trace(subject, oracle, inputs, truth, lambda fraction, what: update(0.8 * fraction, what))
    if not rows:
        raise GraphError("the two graphs share no tensor by name", hint="compare engines of one bundle")
    diverges = error > threshold
    effects = _effects(subject, oracle, inputs, truth, _candidates(rows, threshold))
    chosen = _choose(rows, effects, error, threshold) if diverges else None
    changed = [tapped for tapped in taps if (tapped.error > threshold) != diverges]
    region, notes = None, _notes(rows, changed, diverges, threshold)
    if diverges and (changed or chosen is None or effects[chosen.name] < SHARE * min(error, 1.0)):
        region, why = _bisected(subject, oracle, inputs, truth, threshold, lambda f, w: update(0.8 + 0.2 * f, w))
        notes += why
    culprit = Culprit(chosen, effects[chosen.name], explain(chosen, subject, oracle, inputs)) if chosen else None
    first = next((row for row in rows if row.total is not None and row.total.size > threshold), None)
    return Findings(error, threshold, diverges, tuple(rows), first, culprit, effects, region, tuple(notes))


def _own(row: Row) -> float:
    return row.local.size if row.local is not None else 0.0


def _candidates(rows: Sequence[Row], threshold: float) -> list[Row]:
    """In the order of the graph."""
    flagged = [row for row in rows if _own(row) > threshold][:MOST_FLAGGED]
    largest = sorted((row for row in rows if _own(row)), key=_own, reverse=True)[:CANDIDATES]
    return [row for row in rows if row in flagged or row in largest]


def _effects(subject: Side, oracle: Side, inputs: Arrays, truth: Arrays, candidates: Sequence[Row]) -> dict[str, float]:
    found = ((row.name, _effect(subject, oracle, inputs, truth, row)) for row in candidates)
    return {name: effect for name, effect in found if effect is not None}


def _effect(subject: Side, oracle: Side, inputs: Arrays, truth: Arrays, row: Row) -> float | None:
    """Error of the outputs where this node alone is as in the engine; None where a target refuses a part."""
    try:
        right = {name: inputs[name] for name in row.segment.leaves if name in inputs}
        right |= oracle.values(inputs, [name for name in row.segment.leaves if name not in inputs])
        made = subject.values(right, [row.name])
        found = {**oracle.values({**inputs, **made}, [name for name in truth if name not in made]), **made}
    except (EngineError, GraphError):
        return None
    return worst([distance(array, found[name]) for name, array in truth.items()])


def _choose(rows: Sequence[Row], effects: Mapping[str, float], error: float, threshold: float) -> Row | None:
    """The first node above the threshold that causes a good part of the error alone; else the one that causes most."""
    known = [row for row in rows if row.name in effects]
    enough = math.inf if math.isinf(error) else SHARE * error
    flagged = (row for row in known if _own(row) > threshold and effects[row.name] >= enough)
    return next(flagged, max(known, key=lambda row: effects[row.name], default=None))


def _bisected(
    subject: Side, oracle: Side, inputs: Arrays, truth: Arrays, threshold: float, update: Update
) -> tuple[Region | None, list[str]]:
    try:
        region = bisect(subject, oracle, inputs, truth, threshold, update)
    except (EngineError, GraphError) as error:
        return None, [f"bisecting failed: {error.message}"]
    if region is None:
        return None, ["an engine built again from the graph does not show the error: the engine itself is to blame"]
    return region, []


def _notes(rows: Sequence[Row], changed: Sequence[Tapped], diverges: bool, threshold: float) -> list[str]:
    notes = []
    if changed and diverges:
        names = ", ".join(name for tapped in changed[:2] for name in tapped.names[:4])
        notes.append(
            f"the error of the outputs vanishes while tensors are looked at ({names}{', ...' if changed else ''}): "
            "the runtime fuses other nodes then, so that total errors do not show it and bisecting has to"
        )
    elif changed:
        notes.append(
            f"looking at tensors ({', '.join(changed[0].names[:4])}, ...) makes the outputs diverge, which they do "
            "not in the engine: the runtime fuses other nodes then"
        )
    flagged = [row.name for row in rows if _own(row) > threshold]
    if flagged and not diverges:
        notes.append(
            f"inside, {', '.join(flagged[:5])}{', ...' if len(flagged) > 5 else ''} (of {len(rows)} tensors) "
            f"off by more than {threshold:g}, which does not reach the outputs"
        )
    failed = [row for row in rows if row.total is None and row.local is None]
    if failed:
        why = next((row.reason for row in failed if row.reason), "the target refused the graph that gives them")
        notes.append(f"{len(failed)} of {len(rows)} tensors could not be compared: {why}")
    if diverges and not flagged:
        notes.append(
            f"no node alone is off by more than {threshold:g}: the error adds up over many nodes, or the runtime makes "
            "it where nodes are fused"
        )
    return notes


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
