"""Makes the graph of each stage from a graph whose nodes are marked with their stages.

    inputs      what the stage reads of the model's inputs and of earlier stages
    outputs     what it makes that later stages read, and the model's outputs
    constants   each stage has a copy of those that it reads, and of arithmetic on shapes

Names stay, so what a stage gives is what a later one takes by the same name. A tensor that skips a stage is no part of
the skipped stage's graph: the runner keeps it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from ...errors import GraphError
from ..debug.parts import drop_unused
from ..graph import Graph
from ..graph.cost import at_sizes
from ..graph.identity import STAGE
from ..graph.selection import label
from ..signature import AxisRange, Signature, TensorSpec
from .cut import Piece
from .line import Kinds, varying


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: its graph, and what it takes and gives."""

    graph: Graph
    signature: Signature


Look = tuple[str, int]
"""A tensor and its axis."""


def mark(node: ir.Node, stage: int) -> None:
    """Says in which stage a node runs."""
    node.metadata_props[STAGE] = str(stage)


def mark_pieces(graph: Graph, pieces: Sequence[Piece]) -> None:
    """Marks the nodes of a graph's line by the pieces that it is cut into."""
    nodes = varying(graph)
    for number, piece in enumerate(pieces):
        for node in nodes[slice(*piece.nodes)]:
            mark(node, number)


def marked(graph: Graph) -> int:
    """In how many stages the nodes of a graph are; 0 where they are not marked."""
    return 1 + max(
        (int(node.metadata_props[STAGE]) for node in graph.model.graph if STAGE in node.metadata_props), default=-1
    )


def split(graph: Graph, signature: Signature) -> list[Stage]:
    """The stages of a marked graph.

    Raises:
        GraphError: a node bears no mark, or reads what a later stage makes.
    """
    main, count = graph.model.graph, marked(graph)
    kinds = Kinds(graph)
    stages = {node: _stage_of(node) for node in kinds.varying}
    made = {value: stage for node, stage in stages.items() for value in node.outputs}
    given = {value for value in main.inputs if not value.is_initializer()}
    taken: list[dict[ir.Value, None]] = [{} for _ in range(count)]
    wanted: list[set[ir.Value]] = [set() for _ in range(count)]
    for node in main:
        if node not in stages:
            continue
        stage = stages[node]
        for value in kinds.direct(node):
            if value not in made and value not in given:
                continue  # a constant
            source = made.get(value, -1)
            if source > stage:
                raise GraphError(
                    f"node {label(node)!r} of stage {stage} reads {value.name!r} of stage {source}",
                    hint="stages go forward only",
                )
            if source < stage:
                taken[stage][value] = None
            if 0 <= source < stage:
                wanted[source].add(value)
    looks: list[dict[str, Look]] = [{} for _ in range(count)]
    for node, stage in stages.items():
        for looking in kinds.looked_at(node):
            (root,) = (value for value in looking.inputs if value is not None)
            if root in taken[stage] or made.get(root, -1) == stage or (root not in made and root not in given):
                continue
            if look := _look(looking, root, taken[stage], signature):
                looks[stage][looking.outputs[0].name or ""] = look
                continue
            taken[stage][root] = None
            if root in made:
                wanted[made[root]].add(root)
    for value in main.outputs:
        if value in made:
            wanted[made[value]].add(value)
    specs = _Specs(graph, signature)
    found = []
    for number in range(count):
        outputs = [
            value for node in main if stages.get(node) == number for value in node.outputs if value in wanted[number]
        ]
        own = specs.signature(list(taken[number]), outputs)
        piece = _piece(graph, [v.name or "" for v in taken[number]], [v.name or "" for v in outputs], looks[number])
        found.append(Stage(piece, own))
    return found


def _stage_of(node: ir.Node) -> int:
    if STAGE not in node.metadata_props:
        raise GraphError(f"node {label(node)!r} is in no stage", hint="run the pass partition before")
    return int(node.metadata_props[STAGE])


def _look(looking: ir.Node, root: ir.Value, taken: Iterable[ir.Value], signature: Signature) -> Look | None:
    """Where else the size of an axis shows that a node looks at: then the tensor itself need not pass."""
    shape = list(root.shape or ())
    start, end = (looking.attributes.get_int(name, default) for name, default in (("start", 0), ("end", len(shape))))
    axes = shape[start:end]
    if looking.op_type != "Shape" or len(axes) != 1 or str(axes[0]) not in signature.axes:
        return None
    for value in taken:
        for place, axis in enumerate(value.shape or ()):
            if str(axis) == str(axes[0]):
                return value.name or "", place
    return None


def _piece(graph: Graph, inputs: list[str], outputs: list[str], looks: Mapping[str, Look]) -> Graph:
    copy = graph.clone()
    main = copy.model.graph
    values = {value.name: value for value in main.inputs}
    values |= {value.name: value for node in main for value in node.outputs}
    for name, (other, axis) in looks.items():
        looking = values[name].producer()
        assert looking is not None
        looking.replace_input_with(0, values[other])
        looking.attributes["start"] = ir.AttrInt64("start", axis)
        looking.attributes["end"] = ir.AttrInt64("end", axis + 1)
    main.outputs.clear()
    fresh = []
    for name in inputs:
        value = values[name]
        if value in main.inputs:
            fresh.append(value)
            continue
        source = ir.Value(name=name, type=value.type, shape=value.shape)
        value.name = f"{name}/made"
        value.replace_all_uses_with(source, replace_graph_outputs=True)
        fresh.append(source)
    main.inputs[:] = [*fresh, *(value for value in main.inputs if value.is_initializer())]
    main.outputs.extend(values[name] for name in outputs)
    drop_unused(main)
    for node in main:
        node.metadata_props.pop(STAGE, None)
    return copy


class _Specs:
    """Describes tensors inside the graph: their dynamic axes are those of the model, or vary with them."""

    def __init__(self, graph: Graph, signature: Signature) -> None:
        self._signature = signature
        self._plain = _shapes(graph)
        self._at = {point: _shapes(at_sizes(graph, signature.sizes(point))) for point in ("min", "opt", "max")}
        self._known = {spec.name: spec for spec in (*signature.inputs, *signature.outputs)}

    def signature(self, inputs: list[ir.Value], outputs: list[ir.Value]) -> Signature:
        """Of a stage."""
        axes: dict[str, AxisRange] = {}
        return Signature(
            inputs=tuple(self._spec(value, axes) for value in inputs),
            outputs=tuple(self._spec(value, axes) for value in outputs),
            axes=axes,
        )

    def _spec(self, value: ir.Value, axes: dict[str, AxisRange]) -> TensorSpec:
        name = value.name or ""
        if spec := self._known.get(name):
            named = [axis for axis in spec.shape if isinstance(axis, str) and axis in self._signature.axes]
            axes |= {axis: self._signature.axes[axis] for axis in named}
            return spec
        dtype = (
            {"FLOAT": "float32", "DOUBLE": "float64"}.get(value.dtype.name, value.dtype.name.lower())
            if value.dtype
            else ""
        )
        plain = self._plain.get(name) or ()
        shape = tuple(self._axis(name, place, axis, axes) for place, axis in enumerate(plain))
        return TensorSpec(name, dtype, shape)

    def _axis(self, name: str, place: int, plain: int | str | None, axes: dict[str, AxisRange]) -> int | str:
        if isinstance(plain, int):
            return plain
        if plain is not None and plain in self._signature.axes:
            axes[plain] = self._signature.axes[plain]
            return plain
        sizes = [(self._at[point].get(name) or {place: None})[place] for point in ("min", "opt", "max")]
        low, usual, high = (size if isinstance(size, int) else None for size in sizes)
        if low is None or usual is None or high is None or not 1 <= low <= usual <= high:
            return "?"
        if low == usual == high:
            return low
        symbol = plain if plain and plain.isidentifier() else f"{name}_{place}"
        bounds = AxisRange(low, usual, high)
        if axes.setdefault(symbol, bounds) != bounds:
            symbol = f"{name}_{place}"
            axes[symbol] = bounds
        return symbol


def _shapes(graph: Graph) -> dict[str, tuple[int | str | None, ...]]:
    found = {}
    for node in graph.model.graph:
        for value in node.outputs:
            if value.name and value.shape is not None:
                found[value.name] = tuple(
                    axis if isinstance(axis, int) else (None if axis.value is None else str(axis.value))
                    for axis in value.shape
                )
    return found
