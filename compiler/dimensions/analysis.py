"""Which axes of which tensors change together: the dimension groups of a graph.

Every operator says how the axes of its inputs and outputs correspond (`RULES`); what is left are dimensions that
nothing cuts further: the channels between two convolutions, the neurons of a hidden layer, the heads of an attention.
A dimension comes with every place where it stands, and with the reasons against changing its size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import onnx_ir as ir

from ..graph import Graph
from ..graph.editing import is_constant
from ..graph.schemas import MICROSOFT
from ..graph.selection import label
from ..graph.verifier import subgraphs
from . import computed, pointwise, products, shapes
from .layout import Dim, Hold, Product, Term, describe, hold, leaves, resolved
from .lengths import Sizes
from .relations import Place, Relations

Rule = Callable[[ir.Node, Relations], None]
Role = Literal["writes", "reads", "follows", "carries"]

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(pointwise.UNARY, pointwise.unary),
    **dict.fromkeys(pointwise.BROADCAST, pointwise.broadcast),
    **dict.fromkeys(
        ("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool"), pointwise.pool
    ),
    **dict.fromkeys(("Resize", "Upsample"), pointwise.pool),
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax"), pointwise.reduction),
    **dict.fromkeys(("ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"), pointwise.reduction),
    **dict.fromkeys(("ArgMax", "ArgMin"), pointwise.reduction),
    **dict.fromkeys(("CumSum", "Hardmax", "LogSoftmax", "Softmax"), pointwise.softmax),
    **dict.fromkeys(("LRN", "LpNormalization", "MeanVarianceNormalization"), pointwise.over_axes),
    **dict.fromkeys(pointwise.NORMALIZATIONS, pointwise.layer_norm),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), pointwise.batch_norm),
    "GroupNormalization": pointwise.group_norm,
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), pointwise.quantize),
    **dict.fromkeys(("Conv", "ConvInteger", "ConvTranspose"), products.conv),
    **dict.fromkeys(("MatMul", "MatMulInteger"), products.matmul),
    "Gemm": products.gemm,
    "Einsum": products.einsum,
    **dict.fromkeys(("GRU", "LSTM", "RNN"), products.recurrent),
    "Attention": products.attention,
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), shapes.reshape),
    "Transpose": shapes.transpose,
    **dict.fromkeys(("Expand", "Tile"), shapes.expand),
    "Concat": shapes.concat,
    "Split": shapes.split,
    "Slice": shapes.slice_,
    "Gather": shapes.gather,
    "Pad": shapes.pad,
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), shapes.depth_to_space),
    "ConstantOfShape": computed.constant_of_shape,
    "Shape": computed.shape_of,
    "Size": computed.size_of,
}
"""What each operator says; one that is not here holds all its axes."""

_MICROSOFT = frozenset((
    "BiasGelu", "DequantizeLinear", "FastGelu", "Gelu", "QuantizeLinear", "QuickGelu", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
))  # fmt: skip
"""Operators of com.microsoft that do as those of ONNX of the same name, or that have none; its Attention does not."""

_SEVERAL = frozenset(("DynamicQuantizeLinear", "GRU", "LSTM", "RNN", "Split")) | pointwise.NORMALIZATIONS
"""Operators whose rule tells of all their outputs."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A place where a dimension stands.

    Attributes:
        value: the tensor.
        node: the node that the place belongs to: the reader of a constant, the producer of an activation; None for an
            input of the graph.
        axis: which axis of it.
        term: what the axis is made of.
        role: a constant weight over what its node makes ("writes") or sums over ("reads"), another constant that
            follows suit, or an activation that carries it.
        index: input of the node, for a constant that its readers do not share.
    """

    value: ir.Value
    node: ir.Node | None
    axis: int
    term: Term
    role: Role
    index: int | None = None

    def __str__(self) -> str:
        layout = "" if isinstance(resolved(self.term), Dim) else f" ({describe(self.term)})"
        return f"{self.value.name}:{self.axis}{layout}"


@dataclasses.dataclass(frozen=True)
class Group:
    """A dimension with all that must change with it.

    Attributes:
        name: the node that makes it; with a number where that makes several at once.
        dim: the dimension.
        members: where it stands.
        parents: dimensions that it is repeated in, such as the heads that a head size belongs to.
    """

    name: str
    dim: Dim
    members: tuple[Member, ...]
    parents: frozenset[Dim]

    @property
    def size(self) -> int:
        """How many positions there are."""
        return self.dim.size

    @property
    def holds(self) -> tuple[Hold, ...]:
        """The reasons against changing it."""
        return tuple(self.dim.holds)

    def of(self, role: Role) -> list[Member]:
        """The members with a role."""
        return [member for member in self.members if member.role == role]

    def why_not(self, change: Literal["grow", "shrink"], *, outputs_too: bool = False) -> str:
        """Why it cannot grow or shrink, with the node; empty where it can.

        Args:
            outputs_too: whether an output of the graph may grow, as where the caller cuts off what is new.
        """
        if not self.of("writes"):
            return "no constant weight makes it"
        for found in self.holds:
            if found.blocks in ("both", change) and not (outputs_too and found.at_output):
                return f"{found.reason} ({found.where})"
        return ""


class Dimensions:
    """The dimension groups of a graph.

    Args:
        graph: flat, with shapes inferred, its constants in initializers (`compiler.graph.editing.flattened`). It stays
            as it is; places refer to its nodes and values.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.relations = Relations(Sizes(graph), graph.opset)
        self._relate()
        self.groups = tuple(_named(self._members()))
        self._by_dim = {group.dim: group for group in self.groups}

    def group(self, dim: Dim) -> Group:
        """The group of a dimension."""
        return self._by_dim[dim]

    def at(self, value: ir.Value, axis: int) -> list[Group]:
        """The groups that an axis of a tensor is made of."""
        term = (self.relations.of(value) or [])[axis]
        return [] if term is None else [self.group(dim) for dim in dict.fromkeys(leaves(term)) if dim in self._by_dim]

    def _relate(self) -> None:
        main, relations = self.graph.model.graph, self.relations
        for value in main.inputs:
            for term in relations.of(value) or ():
                hold(term, Hold("it is an input of the model", value.name or ""))
        for node in main:
            if node.op_type not in ("Shape", "Size") and relations.computed(node.outputs[0]) is not None:
                continue  # its axes are places of a shape
            if any(True for _ in subgraphs(node)):
                self._hold_captured(node)
            elif (rule := _rule(node)) is None:
                relations.hold_all(node, f"{node.op_type} is not followed")
            elif node.op_type not in _SEVERAL and any(value.uses() for value in node.outputs[1:]):
                relations.hold_all(node, f"more outputs of {node.op_type} are used")
            else:
                rule(node, relations)
        computed.hold_sums(relations)
        for value in main.outputs:
            for term in relations.of(value) or ():
                hold(term, Hold("it is an output of the model", value.name or "", at_output=True))

    def _hold_captured(self, node: ir.Node) -> None:
        self.relations.hold_all(node, f"{node.op_type} has a body of its own")
        for inner in subgraphs(node):
            for used in inner.all_nodes():
                for value in used.inputs:
                    if value is not None and (value.graph is self.graph.model.graph):
                        self.relations.hold(
                            node, self.relations.of(value) or (), f"the body of {node.op_type} reads it"
                        )

    def _members(self) -> Mapping[Dim, list[Member]]:
        found: dict[Dim, list[Member]] = {}
        for place, axes in self.relations.axes.items():
            for axis, term in enumerate(axes):
                for dim in dict.fromkeys(leaves(term)) if term is not None else ():
                    if dim.size > 1:
                        found.setdefault(dim, []).extend(self._at(place, axis, term))  # type: ignore[arg-type]
        return found

    def _at(self, place: Place, axis: int, term: Term) -> Iterator[Member]:
        value = place.value
        if not is_constant(value):
            yield Member(value, value.producer(), axis, term, "carries")
            return
        readers = [(place.node, place.index)] if place.node else list(value.uses())
        for node, index in readers:
            role: Role = "follows"
            if (index, axis) in self.relations.reads.get(node, ()):
                role = "reads"
            elif (index, axis) in self.relations.writes.get(node, ()):
                role = "writes"
            yield Member(value, node, axis, term, role, place.index if place.node else None)


def _rule(node: ir.Node) -> Rule | None:
    known = not node.domain or (node.domain == MICROSOFT and node.op_type in _MICROSOFT)
    return RULES.get(node.op_type) if known else None


def _named(members: Mapping[Dim, list[Member]]) -> Iterator[Group]:
    """Groups in the order of the graph, by the node that makes them."""
    taken: dict[str, int] = {}
    parents = _parents(members)
    for dim, places in members.items():
        first = next((m for role in ("writes", "carries", "follows", "reads") for m in places if m.role == role), None)
        if first is None:
            continue
        name = label(first.node) if first.node is not None else first.value.name or ""
        taken[name] = taken.get(name, 0) + 1
        numbered = name if taken[name] == 1 else f"{name}#{taken[name]}"
        yield Group(numbered, dim, tuple(places), frozenset(parents.get(dim, ())))


def _parents(members: Mapping[Dim, list[Member]]) -> dict[Dim, set[Dim]]:
    """For each dimension the ones that stand before it in a product."""
    found: dict[Dim, set[Dim]] = {}

    def visit(term: Term, outer: frozenset[Dim]) -> None:
        term = resolved(term)
        if isinstance(term, Dim):
            found.setdefault(term, set()).update(outer - {term})
            return
        for part in term.parts:
            visit(part, outer)
            if isinstance(term, Product):
                outer |= {dim for dim in leaves(part) if dim.size > 1}

    for places in members.values():
        for member in places:
            visit(member.term, frozenset())
    return found
