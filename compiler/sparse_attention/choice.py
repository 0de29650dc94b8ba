"""Chooses which layers attend sparsely, and how, inside a budget.

Each layer is measured alone with each kind. Then they are added one by one, measured together, and stay while the
budget holds: the kinds that read least before the others, and of a kind the layers with the least error first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...passes.base import Refusal
from ..graph import Graph
from .judge import Error, Judge
from .kinds import Kind

Make = Callable[[Mapping[str, Kind]], Graph]
"""Makes the graph in which layers, by name, have a kind."""


@dataclasses.dataclass(frozen=True)
class Alone:
    """A layer with a kind, and all others dense."""

    layer: str
    kind: Kind
    error: Error


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        kinds: by layer; layers that are left out stay dense.
        error: of all together; None where nothing was chosen.
        alone: what each layer does by itself.
        refusals: one for each layer that stays dense.
    """

    kinds: Mapping[str, Kind]
    error: Error | None
    alone: Sequence[Alone]
    refusals: tuple[Refusal, ...]

    def record(self) -> dict[str, Any]:
        """As JSON."""
        rows = [
            {
                "layer": entry.layer,
                "kind": str(entry.kind),
                "chosen": self.kinds.get(entry.layer) == entry.kind,
                **entry.error.record(),
            }
            for entry in self.alone
        ]
        return {"sparse_attention": rows, "together": self.error.record() if self.error else None}


def choose(
    make: Make,
    layers: Sequence[str],
    kinds: Sequence[Kind],
    judge: Judge,
    budget: float,
    *,
    length: int,
    progress: Callable[[float, str], None],
) -> Choice:
    """Chooses for these layers, whose caches hold `length` tokens.

    Raises:
        GraphError: ONNX Runtime refuses a graph.
    """
    pairs = [(layer, kind) for layer in layers for kind in kinds]
    alone = []
    for number, (layer, kind) in enumerate(pairs):
        progress(number / (2 * len(pairs)), f"{layer}, {kind}")
        alone.append(Alone(layer, kind, judge.measure(make({layer: kind}))))
    chosen: dict[str, Kind] = {}
    error: Error | None = None
    reasons: dict[str, str] = {}
    order = sorted(alone, key=lambda entry: (entry.kind.reads(length), entry.error.value))
    for number, entry in enumerate(order):
        progress(0.5 + number / (2 * len(order)), f"{entry.layer}, {entry.kind}, with those before")
        if entry.layer in chosen:
            continue
        if not entry.error.value < budget:
            reasons[entry.layer] = f"{entry.kind} alone {_told(entry.error, budget)}"
            continue
        together = judge.measure(make({**chosen, entry.layer: entry.kind})) if chosen else entry.error
        if not together.value < budget:
            reasons[entry.layer] = f"{entry.kind} together with what was chosen before {_told(together, budget)}"
            continue
        chosen[entry.layer], error = entry.kind, together
    refusals = tuple(
        Refusal(f"attention stays dense: {reasons[layer]}", layer) for layer in layers if layer not in chosen
    )
    return Choice(chosen, error, alone, refusals)


def _told(error: Error, budget: float) -> str:
    if error.change is None:
        return f"changes the logits by a relative L2 of {error.relative_l2:.2g}, the budget is {budget:g}"
    return (
        f"changes the mean ln p of {error.tokens} held-out tokens by {error.change:+.2g}, standard error "
        f"{error.deviation:.2g}, the budget is {budget:g}"
    )
