"""What runtimes tell of the time that each layer of an engine takes.

Loading an engine imports this file with `base`, so it needs the standard library only.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Literal

CALLS = 40
"""Calls that a profile is taken over, where no call is slow."""

BUDGET_S = 1.0
"""Seconds after which a profile makes no further call."""

LEAST_CALLS = 3


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """One layer of an engine: a node of the graph, or several that the runtime has fused.

    Attributes:
        ms: milliseconds of a call, all executions of the layer within it together.
        device: where it ran.
        transfer: whether it only copies between host and device.
        nodes: names of the graph's nodes that the runtime says it was made from; several runtimes do not tell.
        outputs: names of the tensors that it gives.
        flops: operations on numbers, and `bytes` read and written, where the runtime tells; None where it does not.
    """

    name: str
    operator: str
    ms: float
    device: Literal["cpu", "cuda"]
    transfer: bool = False
    nodes: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    flops: float | None = None
    bytes: float | None = None


@dataclasses.dataclass(frozen=True)
class Profile:
    """Layers in the order in which they ran.

    Attributes:
        how: what measured it, for people.
        calls: how many calls were made; times are medians of their quieter half.
        shapes: of tensors, as they were when it ran; empty where the runtime does not tell.
        notes: what stands against taking the times as they are.
        complete: whether everything that the engine computes is in a layer.
    """

    layers: tuple[LayerTime, ...]
    how: str
    calls: int
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    complete: bool = True


def calls_for(call_ms: float) -> int:
    """How many calls to profile of an engine whose call takes this long."""
    return max(LEAST_CALLS, min(CALLS, int(1000 * BUDGET_S / max(call_ms, 1e-3))))


def medians(runs: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The median of each key over the quieter half of the runs, 0 where one does not have it; in the first run's order.

    What disturbs a run, as other processes do, makes it longer and never shorter.
    """
    import statistics

    found = list(runs)
    quiet = sorted(found, key=lambda run: sum(run.values()))[: (len(found) + 1) // 2]
    keys = dict.fromkeys(key for run in found for key in run)
    return {key: statistics.median(run.get(key, 0.0) for run in quiet) for key in keys}


def parts_of(name: str) -> tuple[str, ...]:
    """The names that a runtime has joined to the name of a fused layer: ``conv1 + relu1``, ``{add, mul}``."""
    inner = [part for text in re.split(r"\s\+\s|[\x1e\x1f]", name) for part in _within_brackets(text)]
    return tuple(part for part in (text.strip() for text in inner) if part)


def _within_brackets(text: str) -> list[str]:
    found = re.search(r"[\[{(](?P<inner>[^\[\]{}()]*)[\]})]", text)
    if found is None:
        return [text]
    return [*found.group("inner").split(","), text.replace(found.group(0), "")]
