"""Collects what the nodes of a graph say of the axes of their tensors.

Each axis of more than one position has a term (`layout.Term`); an axis of one position, or of a length that is not
known, has none. Dynamic axes get a length for the time of the analysis, so that heads are found where a model reshapes
them together with the batch. A constant has one set of axes, whoever reads it, but for vectors: equal biases of two
layers are often stored once, and have nothing to do with each other. So each reader of a vector has axes of its own.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from ..graph.editing import is_constant
from ..graph.selection import label
from .layout import Blocks, Concat, Dim, Hold, LayoutConflictError, Term, hold, unify
from .lengths import Computed, Lengths, Sizes

Axes = list[Term | None]
Marks = dict[ir.Node, set[tuple[int, int]]]
"""Axes of constants, by the node that reads them: input and axis."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where axes belong: a tensor, or one input of one node that holds a vector."""

    value: ir.Value
    node: ir.Node | None = None
    index: int = 0


class Relations:
    """What is known of the axes so far; rules ask for axes, tie them and hold them.

    Args:
        sizes: of the graph.
        opset: of the default domain; older operators mean other axes.
    """

    def __init__(self, sizes: Sizes, opset: int) -> None:
        self._sizes = sizes
        self.opset = opset
        self.axes: dict[Place, Axes] = {}
        self.attributes: dict[ir.Node, dict[str, Term]] = collections.defaultdict(dict)
        """Attributes that tell sizes."""
        self.shapes: dict[ir.Node, tuple[int, list[Term]]] = {}
        """Inputs that tell all lengths of a node's output: which input, and what they must be."""
        self.splits: dict[ir.Node, list[Term]] = {}
        """The pieces that a Split makes."""
        self.cuts: dict[ir.Node, dict[int, list[Term]]] = collections.defaultdict(dict)
        """Where a Slice cuts, by axis: what lies before, in and behind the slice."""
        self.places: dict[ir.Node, list[Term]] = {}
        """What lies before, at and behind the one position that a Gather takes."""
        self.reads: Marks = collections.defaultdict(set)
        """Axes of a constant weight that are summed over."""
        self.writes: Marks = collections.defaultdict(set)
        """Axes of a constant weight over what is made of it."""

    def of(self, value: ir.Value) -> Axes | None:
        """The axes of a tensor; None where not even their number is known."""
        return self._at(Place(value), value)

    def input(self, node: ir.Node, index: int) -> Axes | None:
        """The axes of an input; None where it is left out or nothing is known."""
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return None
        return self._at(self.place(node, index), value)

    def output(self, node: ir.Node, index: int = 0) -> Axes | None:
        """The axes of an output; None where it is left out or nothing is known."""
        value = node.outputs[index] if index < len(node.outputs) else None
        return self.of(value) if value is not None and value.name else None

    def place(self, node: ir.Node, index: int) -> Place:
        """Where the axes of an input belong."""
        value = node.inputs[index]
        assert value is not None
        vector = is_constant(value) and sum(size != 1 for size in self.sizes(value) or ()) <= 1
        return Place(value, node, index) if vector else Place(value)

    def _at(self, place: Place, value: ir.Value) -> Axes | None:
        if place not in self.axes:
            known = self.sizes(value)
            if known is None:
                return None
            self.axes[place] = [Dim(size) if size is not None and size > 1 else None for size in known]
        return self.axes[place]

    def sizes(self, value: ir.Value | None) -> Lengths | None:
        """Lengths of the axes, None for one that is not known; None where their number is not known."""
        if value is None:
            return None
        if value.const_value is not None:
            return list(value.const_value.shape.numpy())
        return self._sizes.lengths.get(value.name or "")

    def fixed(self, value: ir.Value | None) -> list[bool]:
        """For each axis of an activation, whether its length is known and the same at all sizes of dynamic axes."""
        return [] if value is None else self._sizes.fixed.get(value.name or "", [])

    def computed(self, value: ir.Value | None) -> Computed | None:
        """What is computed from lengths alone, the same each time."""
        return None if value is None else self._sizes.computed.get(value.name or "")

    def constant(self, node: ir.Node, index: int) -> np.ndarray | None:
        """An input that is a constant, or computed from fixed lengths alone."""
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return None
        if is_constant(value) and value.const_value is not None:
            return value.const_value.numpy()
        computed = self.computed(value)
        return computed.array if computed is not None and computed.fixed.all() else None

    def integers(self, node: ir.Node, index: int, attribute: str) -> list[int] | None:
        """Whole numbers that older opsets have in an attribute and newer ones in an input; None where not constant."""
        if attribute in node.attributes:
            return list(node.attributes.get_ints(attribute) or ())
        found = self.constant(node, index)
        return None if found is None else [int(number) for number in found.reshape(-1)]

    def tie(self, node: ir.Node, *terms: Term | None) -> None:
        """Makes axes equal; where that cannot be, or the length of one is not known, all keep their sizes."""
        given = [term for term in terms if term is not None]
        if len(given) < len(terms):
            self.hold(node, given, "it meets an axis of another or unknown length")
            return
        for one, other in itertools.pairwise(given):
            self._unify(node, one, other)

    def _unify(self, node: ir.Node, one: Term, other: Term) -> None:
        try:
            unify(one, other)
        except LayoutConflictError as error:
            self.hold(node, (one, other), str(error))

    def tie_all(self, node: ir.Node, first: Axes | None, second: Axes | None) -> None:
        """Ties axis by axis."""
        if first is None or second is None or len(first) != len(second):
            self.hold(node, [*(first or ()), *(second or ())], "the shape of what it becomes is not known")
            return
        for one, other in zip(first, second, strict=True):
            if one is not None or other is not None:
                self.tie(node, one, other)

    def broadcast(
        self, node: ir.Node, indices: Iterable[int], output: Axes | None, *, batch: int | None = None
    ) -> None:
        """Ties inputs to the output that they are broadcast to, aligned at the last axis.

        Args:
            batch: how many axes at the end to leave out.
        """
        kept = slice(None) if not batch else slice(None, -batch)
        for index in indices:
            axes, value = self.input(node, index), node.inputs[index] if index < len(node.inputs) else None
            if axes is None or output is None:
                self.hold(node, [*(axes or ()), *(output or ())], "the shape of what it becomes is not known")
                continue
            own, whole = list(zip(axes, self.sizes(value) or (), strict=True))[kept], output[kept]
            for (axis, size), out in zip(reversed(own), reversed(whole), strict=False):
                if size != 1 and (axis is not None or out is not None):
                    self.tie(node, axis, out)

    def hold(self, node: ir.Node, terms: Iterable[Term | None], reason: str, blocks: Blocks = "both") -> None:
        """Notes why axes keep their size."""
        for term in terms:
            hold(term, Hold(reason, label(node), blocks))

    def hold_all(self, node: ir.Node, reason: str) -> None:
        """Notes it for all axes of a node's inputs and outputs."""
        for index in range(len(node.inputs)):
            self.hold(node, self.input(node, index) or (), reason)
        for index in range(len(node.outputs)):
            self.hold(node, self.output(node, index) or (), reason)


def axis_of(axes: Sequence[Term | None], axis: int) -> Term | None:
    """An axis that may be counted from the end."""
    return axes[axis] if -len(axes) <= axis < len(axes) else None


def hold_offset(node: ir.Node, index: int, axes: Iterable[Term | None], relations: Relations) -> None:
    """Keeps a quantized weight from growing where no one number stands for 0, which is what new positions are."""
    if present(node, index):
        offset = relations.constant(node, index)
        if offset is None or bool((offset != offset.flat[0]).any()):
            relations.hold(node, axes, "its zero points differ", "grow")


def present(node: ir.Node, index: int) -> bool:
    """Whether an input is given."""
    return index < len(node.inputs) and node.inputs[index] is not None


def without(axes: Axes, axis: int) -> Iterator[Term | None]:
    """All but one."""
    return (term for place, term in enumerate(axes) if place != axis % len(axes))


def parts(axes: Sequence[tuple[Term | None, int | None]]) -> Concat | None:
    """Axes one behind the other, those of one position too; None where a length is not known."""
    terms: list[Term] = []
    for term, size in axes:
        if size is None:
            return None
        if size:
            terms.append(term if term is not None else Dim(1))
    return Concat(tuple(terms))
