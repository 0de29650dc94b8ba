"""Which nodes of the graph each layer of an engine computes.

Runtimes fuse, rename and add nodes, but mostly keep the name of the tensor that a fused kernel gives in the end, or of
the nodes that it took in. Such a tensor or node anchors the layer; what leads up to it, as far as the anchors of other
layers, belongs to it too. Nodes that no layer reaches are computed when the engine is built, or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import onnx_ir as ir

from ...targets.profile import LayerTime, parts_of
from ..graph import Graph
from ..graph.selection import label

_ADDED = re.compile(
    r"(_nchwc|_nhwc|_token_\d+|_fused|_cast|/\w*Fusion/?|/duplicated|_CastFloat\d*\w*|\.\d+/fused|"
    r"/WithoutBiases|/fq_\w+|_quantized|_QuantizeLinear|_DequantizeLinear)$"
)
"""What runtimes put behind the names of nodes and tensors."""

_BEFORE = re.compile(r"^(InsertedPrecisionFreeCast_|InsertedCast_|QuantizeLinear/|DequantizeLinear/|onnx_graph_\d+/)")
"""And before them."""


def nodes_of(graph: Graph, layers: Sequence[LayerTime]) -> list[tuple[ir.Node, ...]]:
    """The nodes of each layer, none where its names lead nowhere; a node belongs to one layer only."""
    nodes = list(graph.nodes())
    places = {node: place for place, node in enumerate(nodes)}
    tensors = {value.name: node for node in nodes for value in node.outputs if value.name}
    named = {label(node): node for node in reversed(nodes)}
    owner: dict[ir.Node, int] = {}
    anchors: list[list[ir.Node]] = []
    for number, layer in enumerate(layers):
        found = [node for name in _names(layer) if (node := tensors.get(name) or named.get(name)) is not None]
        own = [node for node in dict.fromkeys(found) if owner.setdefault(node, number) == number]
        anchors.append(own)
    for number, own in enumerate(anchors):
        for anchor in own:
            _claim(anchor, number, owner)
    grouped: list[list[ir.Node]] = [[] for _ in layers]
    for node, number in owner.items():
        grouped[number].append(node)
    return [tuple(sorted(group, key=places.__getitem__)) for group in grouped]


def _claim(anchor: ir.Node, number: int, owner: dict[ir.Node, int]) -> None:
    """Gives a layer what leads up to one of its nodes and is nobody's yet."""
    waiting = [anchor]
    while waiting:
        node = waiting.pop()
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer not in owner:
                owner[producer] = number
                waiting.append(producer)


def _names(layer: LayerTime) -> Iterator[str]:
    """What may be the name of a tensor that the layer gives, or of a node in it; the surest first."""
    plain = (*layer.outputs, *layer.nodes, layer.name, *parts_of(layer.name))
    yield from plain
    yield from _stripped(plain)


def _stripped(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        before, text = "", name
        while before != text:
            before, text = text, _BEFORE.sub("", _ADDED.sub("", text))
            if text and text != before:
                yield text
