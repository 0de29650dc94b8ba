"""The nodes of a graph one after the other, and what would have to pass where the line is cut.

    position p          before node p: stages are nodes 0..p-1 and p..
    crosses p           made before p, or an input of the model, and read at p or behind it; or an output of the model

What depends on no input is not in the line, nor on shapes alone: each stage has its own copy of such constants and
shapes. A node with branches or a body stays whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import onnx_ir as ir

from ...passes.dedupe import RANDOM
from ..debug.parts import reads
from ..graph import Graph
from ..graph.schemas import MICROSOFT
from ..graph.selection import label
from ..graph.verifier import subgraphs
from ..signature import DTYPES

_SHAPES = frozenset(("Shape", "Size"))
_COUNTS = frozenset((
    "Add", "Cast", "Concat", "Div", "Equal", "Gather", "Identity", "Max", "Min", "Mod", "Mul", "Neg", "ReduceProd",
    "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
))  # fmt: skip
"""What is computed of shapes, and is as small as they are."""


@dataclasses.dataclass(frozen=True)
class Crossing:
    """A tensor that passes from stage to stage, where the line is cut between its first and its last place.

    Attributes:
        first: place of the node that makes it, -1 for an input of the model.
        last: place of the last node that reads it; for an output of the model that of the last node.
        size_bytes: None where it is not known.
        reason: why it cannot pass; empty where it can.
    """

    name: str
    first: int
    last: int
    size_bytes: int | None
    reason: str


@dataclasses.dataclass(frozen=True)
class Weight:
    """A constant and the places of the nodes that read it, in their order."""

    size_bytes: int
    places: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Line:
    """What there is to cut.

    Attributes:
        labels: of the nodes, in their order.
        whole: labels of nodes with branches or a body.
    """

    labels: tuple[str, ...]
    crossings: tuple[Crossing, ...]
    weights: tuple[Weight, ...]
    whole: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


def line_of(graph: Graph, sized: Graph, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Line:
    """The line of a graph.

    Args:
        sized: the same with the shapes at which bytes count, see `cost.at_sizes`.
        shapes: of tensors, where inference does not find them.
    """
    main = graph.model.graph
    kinds = Kinds(graph)
    nodes = kinds.varying
    places = {node: place for place, node in enumerate(nodes)}
    known = {value.name: value for value in _values(sized.model.graph)}
    last = {value: -1 for value in main.inputs if not value.is_initializer()}
    for place, node in enumerate(nodes):
        last.update(dict.fromkeys(kinds.sources(node), place))
    for value in main.outputs:
        last[value] = len(nodes) - 1
    crossings, constants = [], dict[ir.Value, list[int]]()
    for value, end in last.items():
        producer = value.producer()
        if producer in places or (producer is None and not value.is_initializer()):
            start = places.get(producer, -1) if producer is not None else -1
            found = known.get(value.name, value)
            size = _bytes(found, (shapes or {}).get(value.name or ""))
            crossings.append(Crossing(value.name or "", start, end, size, "" if start < 0 else _reason(value, size)))
    for place, node in enumerate(nodes):
        for weight in _weights(node, main, places):
            constants.setdefault(weight, []).append(place)
    weights = tuple(
        Weight(value.const_value.nbytes, tuple(dict.fromkeys(used)))
        for value, used in constants.items()
        if value.const_value is not None
    )
    whole = tuple(label(node) for node in nodes if any(True for _ in subgraphs(node)))
    return Line(tuple(map(label, nodes)), tuple(crossings), weights, whole)


class Kinds:
    """Which nodes of the main graph are in the line; all others have copies in each stage that reads them.

    Attributes:
        varying: those that depend on values of the inputs, or on chance, and that the outputs depend on.
        shaped: what depends on shapes alone. It lies on the host, from where it would have to be fetched between GPUs.
    """

    def __init__(self, graph: Graph) -> None:
        self._main = main = graph.model.graph
        needed = _needed(main)
        moving = {value for value in main.inputs if not value.is_initializer()}
        self.varying: list[ir.Node] = []
        self.shaped: set[ir.Value] = set()
        for node in main:
            if node not in needed:
                continue
            read = set(reads(node, main))
            if _repeats(node) and not read & (moving | self.shaped):
                continue
            if _repeats(node) and (node.op_type in _SHAPES or (node.op_type in _COUNTS and not read & moving)):
                self.shaped.update(node.outputs)
            else:
                moving.update(node.outputs)
                self.varying.append(node)

    def direct(self, node: ir.Node) -> list[ir.Value]:
        """What a node reads that is no shape."""
        return [value for value in dict.fromkeys(reads(node, self._main)) if value not in self.shaped]

    def looked_at(self, node: ir.Node) -> list[ir.Node]:
        """The nodes that look at the shapes which a node reads, by way of arithmetic too."""
        found: dict[ir.Node, None] = {}
        todo = [value.producer() for value in reads(node, self._main) if value in self.shaped]
        while todo:
            inner = todo.pop()
            if inner is None or inner in found:
                continue
            if inner.op_type in _SHAPES:
                found[inner] = None
            todo += [value.producer() for value in reads(inner, self._main) if value in self.shaped]
        return list(found)

    def sources(self, node: ir.Node) -> list[ir.Value]:
        """All tensors that have to be there for a node: what it reads, and what it only wants the shape of."""
        roots = [value for inner in self.looked_at(node) for value in inner.inputs if value is not None]
        return list(dict.fromkeys([*self.direct(node), *roots]))


def varying(graph: Graph) -> list[ir.Node]:
    """The nodes of the line."""
    return Kinds(graph).varying


def _needed(main: ir.Graph) -> set[ir.Node]:
    found: set[ir.Node] = set()
    todo = list(main.outputs)
    while todo:
        node = todo.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            todo += reads(node, main)
    return found


def _repeats(node: ir.Node) -> bool:
    """Whether a node gives the same each time, where its inputs do, and may be computed by several stages."""
    known = node.domain in ("", MICROSOFT) and node.op_type not in RANDOM
    return known and not any(output.is_graph_output() for output in node.outputs) and not any(subgraphs(node))


def _weights(node: ir.Node, main: ir.Graph, places: Mapping[ir.Node, int]) -> Iterator[ir.Value]:
    """The constants that a node reads, by way of what is computed from constants alone too."""
    todo, seen = [node], {node}
    while todo:
        for value in reads(todo.pop(), main):
            producer = value.producer()
            if producer is None and value.is_initializer():
                yield value
            elif producer is not None and producer not in places and producer not in seen:
                seen.add(producer)
                todo.append(producer)


def _values(main: ir.Graph) -> Iterator[ir.Value]:
    yield from main.inputs
    for node in main:
        yield from node.outputs


def _bytes(value: ir.Value, shape: tuple[int, ...] | None) -> int | None:
    if value.dtype is None or value.dtype == ir.DataType.STRING or value.shape is None:
        return None
    sizes = [axis for axis in value.shape if isinstance(axis, int)]
    if len(sizes) < len(value.shape):
        if shape is None:
            return None
        sizes = list(shape)
    return math.ceil(math.prod(sizes) * float(value.dtype.itemsize))


def _reason(value: ir.Value, size: int | None) -> str:
    if not isinstance(value.type, ir.TensorType):
        return f"{value.name!r} is no tensor"
    dtype = value.type.dtype.name.lower()
    named = {"float": "float32", "double": "float64"}.get(dtype, dtype)
    if named not in DTYPES or named == "bfloat16":
        return f"{value.name!r} is of {named}, which arrays cannot hold"
    return f"the shape of {value.name!r} is known only when it runs" if size is None else ""
