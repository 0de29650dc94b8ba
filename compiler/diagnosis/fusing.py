"""Actions that put one kernel in the place of many: what lies between them is not moved, and they start once.

after = before x limit of all nodes as one kernel / sum of the limits of the layers
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from ..graph.cost import multiply_adds
from ..manifest import Action
from ..options import split
from .bounds import Measured
from .situation import Situation, action

STEPS = 8
"""Nodes at most between a product of attention and its Softmax: a scale, a mask, casts."""


def fusing(situation: Situation) -> Iterator[Action | None]:
    """The rewrites that the target gains by, where the engine still has what they fuse."""
    attention = "fuse-attention" if situation.info.signature.states else "fuse-transformer"
    for text in situation.target.rewrites(situation.info.precision):
        name, _ = split(text)
        if name not in (attention, "fuse-embeddings"):
            continue
        groups = attentions(situation) if name == attention else embeddings(situation)
        what = "attention" if name == attention else "tables"
        savings = {layer: saved for group in groups for layer, saved in _saved(situation, group).items()}
        count = sum(len(group) for group in groups)
        yield action(f"--pass {text}", f"{len(groups)} times {what}: {count} layers read and write in between", savings)


def attentions(situation: Situation) -> list[list[Measured]]:
    """Layers from the product of queries and keys, by way of Softmax, to the product with values."""
    owners = {node: layer for layer in situation.layers for node in layer.nodes}
    found: dict[Measured, list[Measured]] = {}
    for node, layer in owners.items():
        if node.op_type != "Softmax":
            continue
        before, after = _back(node), _next_product(node)
        if before and after is not None:
            chain = dict.fromkeys(owners[part] for part in (*reversed(before), node, after) if part in owners)
            if len(chain) > 1:
                found[layer] = list(chain)
    return list(found.values())


def embeddings(situation: Situation) -> list[list[Measured]]:
    """Layers that pick rows of constant tables, where there are several."""
    layers = [layer for layer in situation.layers if len(layer.nodes) == 1 and _picks_rows(layer.nodes[0])]
    return [layers] if len(layers) > 1 else []


def _saved(situation: Situation, group: Sequence[Measured]) -> dict[Measured, float]:
    """What each layer takes less where all are one."""
    known = [layer for layer in group if layer.work is not None and layer.limit_ms]
    if situation.workload is None or len(known) != len(group):
        return {}
    whole = situation.workload.of([node for layer in group for node in layer.nodes])
    apart_ms = sum(layer.limit_ms or 0.0 for layer in group)
    part = 1 - situation.roof.limit_ms(whole) / apart_ms
    return {layer: layer.ms * part for layer in group} if part > 0 else {}


def _back(node: ir.Node) -> list[ir.Node]:
    """The nodes that lead to the first input of a node, from it back to a product; none where there is no product."""
    found: list[ir.Node] = []
    while len(found) < STEPS:
        producers = [value.producer() for value in node.inputs if value is not None]
        made = next((producer for producer in producers if producer is not None), None)
        if made is None:
            return []
        found.append(made)
        if multiply_adds(made):
            return found
        node = made
    return []


def _next_product(node: ir.Node) -> ir.Node | None:
    for _ in range(STEPS):
        uses = [use.node for value in node.outputs for use in value.uses()]
        if len(uses) != 1:
            return None
        node = uses[0]
        if multiply_adds(node):
            return node
    return None


def _picks_rows(node: ir.Node) -> bool:
    return node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].const_value is not None
