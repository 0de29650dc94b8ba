"""What reads the positions of a dimension through constant weights, seen as y = W x."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from ..dimensions import Group, Member
from ..dimensions.layout import owners
from ..graph import Graph
from ..graph.probe import chunks
from ..quantization.hessians import hessians
from ..quantization.layers import Layer, as_layer, constant

HELD_BYTES = 1 << 29
"""Bytes of second moments that are held at a time; those of one dimension at least."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """A constant weight that sums over the positions of a dimension.

    Attributes:
        weight: (groups, out, n), n = in/groups x kernel as the layer reads it.
        owner: (n,) the position that each of the n belongs to; -1 for those of other dimensions.
        layer: the layer; None where the node is none whose inputs can be looked at, such as an LSTM.
    """

    weight: np.ndarray
    owner: np.ndarray
    layer: Layer | None


def readers(group: Group) -> list[Reader]:
    """The readers of a group."""
    return [_reader(group, member) for member in group.of("reads")]


def _reader(group: Group, member: Member) -> Reader:
    assert member.node is not None
    layer = as_layer(member.node)
    owner = owners(member.term, group.dim)
    if layer is None:
        array = np.moveaxis(constant(member.value), member.axis, -1)
        return Reader(array.reshape(1, -1, array.shape[-1]).astype(np.float32), owner, None)
    weight = layer.load()
    kernel = math.prod(weight.shape[2:])
    return Reader(weight.reshape(layer.groups, -1, weight.shape[1] * kernel), np.repeat(owner, kernel), layer)


def with_moments(
    graph: Graph, groups: Iterable[Group], samples: Iterable[Mapping[str, np.ndarray]]
) -> Iterator[tuple[Group, list[tuple[Reader, np.ndarray]]]]:
    """Yields each group with its readers and the second moments (groups, n, n) of what they read.

    Readers whose inputs cannot be looked at count as if these were independent, with a mean square of one.

    Raises:
        GraphError: ONNX Runtime refuses the graph or the samples.
        TargetUnavailableError: ONNX Runtime is not installed.
    """
    found = {group.name: (group, readers(group)) for group in groups}
    cost = {
        name: sum(4 * len(r.weight) * len(r.owner) ** 2 for r in own if r.layer is not None)
        for name, (_, own) in found.items()
    }
    for lot in chunks(cost, HELD_BYTES):
        layers = [r.layer for name in lot for r in found[name][1] if r.layer is not None]
        moments = {layer: total for alike, total in hessians(graph, layers, samples) for layer in alike}
        for name in lot:
            group, own = found[name]
            yield group, [(r, _independent(r) if r.layer is None else moments[r.layer]) for r in own]


def _independent(reader: Reader) -> np.ndarray:
    return np.eye(len(reader.owner), dtype=np.float32)[None]
