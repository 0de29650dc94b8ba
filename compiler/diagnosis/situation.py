"""What the rules for actions look at, and how an action is made of the savings of layers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping

from ...errors import EnginesmithError
from ...targets.base import EngineInfo, Target
from ..dimensions import Dimensions
from ..graph.cost import multiply_adds
from ..graph.selection import label
from ..graph.work import Workload, is_weighted
from ..manifest import Action
from ..quantization.candidates import prepared
from ..signature import Signature
from .bounds import Measured, Roof
from .reading import Reading

NAMED = 8
"""Nodes of an action that are named, those first where it saves most."""


@dataclasses.dataclass(frozen=True, eq=False)
class Situation:
    """An engine that was measured.

    Attributes:
        workload: its graph at these sizes; None where there is none.
        sizes: of the dynamic axes.
        total_ms: of a call.
        complete: whether all that is computed is in a layer.
        reading: of the data that it runs on; None where they are made up or were not looked at.
    """

    target: Target
    info: EngineInfo
    roof: Roof
    layers: tuple[Measured, ...]
    workload: Workload | None
    signature: Signature
    sizes: Mapping[str, int]
    total_ms: float
    complete: bool = True
    reading: Reading | None = None

    @property
    def outside_ms(self) -> float:
        """Of a call, what is in no layer; 0 where the runtime keeps some to itself."""
        if not self.complete:
            return 0.0
        return max(0.0, self.total_ms - sum(layer.ms for layer in self.layers))

    @property
    def on_gpu(self) -> bool:
        """Whether the engine runs on a GPU."""
        return self.roof.ceilings.device == "cuda"

    @functools.cached_property
    def products(self) -> tuple[Measured, ...]:
        """Layers whose work is known and that multiply."""
        return tuple(layer for layer in self.layers if layer.work is not None and layer.work.heavy)

    @functools.cached_property
    def weighted(self) -> tuple[Measured, ...]:
        """Products with constant weights."""
        return tuple(layer for layer in self.products if any(map(is_weighted, layer.nodes)))

    @functools.cached_property
    def dimensions(self) -> Dimensions | None:
        """The dimensions of the graph at these sizes; None where there is no graph, or they cannot be followed."""
        if self.workload is None:
            return None
        try:
            return Dimensions(prepared(self.workload.graph))
        except EnginesmithError:
            return None

    def of_nodes(self, labels: Collection[str]) -> list[Measured]:
        """The layers with one of these nodes."""
        return [layer for layer in self.layers if any(label(node) in labels for node in layer.nodes)]


def action(text: str, why: str, savings: Mapping[Measured, float], *, beside_ms: float = 0.0) -> Action | None:
    """An action from what it saves in each layer, and beside them; None where it saves nothing."""
    worth = sorted(savings, key=lambda layer: -savings[layer])
    total = sum(savings.values()) + beside_ms
    if not total > 0:
        return None
    names = [main_node(layer) for layer in worth if savings[layer] > 0][:NAMED]
    node = names[0] if names else ""
    return Action(action=text, node=node, nodes=names, saves_ms=total, why=why, found="", found_ms=None)


def main_node(layer: Measured) -> str:
    """What a layer is called: the node in it that multiplies most, else its last, else its own name."""
    main = max(layer.nodes, key=multiply_adds, default=None)
    if main is None:
        return layer.layer.name
    return label(main if multiply_adds(main) else layer.nodes[-1])


def operators(layer: Measured) -> set[str]:
    """Operators of the nodes of a layer."""
    return {node.op_type for node in layer.nodes}
