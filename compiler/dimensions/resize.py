"""Changes the size of dimensions wherever they stand: in weights, and in what tells sizes in attributes and shapes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..graph.editing import Names, add_initializer, is_constant
from ..graph.selection import label
from .analysis import Dimensions, Member
from .layout import Dim, Term, leaves, positions, resolved, size_after
from .lengths import Computed

_ONES = frozenset((("BatchNormalization", 4), ("DequantizeLinear", 1), ("Div", 1), ("Mod", 1), ("QuantizeLinear", 1)))
"""Inputs of operators in which new positions are 1, since something is divided by them."""

_ZERO_POINTS = {
    **dict.fromkeys((("ConvInteger", 1), ("ConvInteger", 3), ("MatMulInteger", 1), ("MatMulInteger", 3)), 3),
    **dict.fromkeys((("DequantizeLinear", 0), ("DequantizeLinear", 2), ("QuantizeLinear", 2)), 2),
}
"""Inputs in which new positions are what stands for 0, and the input that tells what does."""


def resize(dimensions: Dimensions, chosen: Mapping[Dim, np.ndarray]) -> dict[Member, np.ndarray]:
    """Gives dimensions other positions, in the graph that was analysed; analyse it anew before the next change.

    Args:
        chosen: for each dimension that changes, which of its positions are there afterwards, in order; -1 for a new
            one, whose weights are 0 (see `new_number`).

    Returns:
        For every constant and axis that changed, the positions that were taken.
    """
    if not chosen:
        return {}
    run = _Resizing(dimensions, chosen)
    run.freeze()
    taken = run.constants()
    run.numbers()
    run.shapes()
    return taken


class _Resizing:
    def __init__(self, dimensions: Dimensions, chosen: Mapping[Dim, np.ndarray]) -> None:
        self._dimensions = dimensions
        self._graph = dimensions.graph
        self._names = Names(self._graph)
        self._chosen = {dim: np.asarray(array) for dim, array in chosen.items()}
        self._sizes = {dim: len(array) for dim, array in self._chosen.items()}

    def constants(self) -> dict[Member, np.ndarray]:
        """Takes the positions of constants; a vector whose readers want different ones becomes several."""
        taken: dict[Member, np.ndarray] = {}
        arrays: dict[tuple[ir.Value, ir.Node | None, int | None], np.ndarray] = {}
        members = {m: None for dim in self._chosen for m in self._dimensions.group(dim).members if is_constant(m.value)}
        done: set[tuple[ir.Value, ir.Node | None, int | None, int]] = set()
        for member in members:
            key = (member.value, member.node if member.index is not None else None, member.index)
            taken[member] = positions(member.term, self._chosen)
            if (*key, member.axis) in done:  # read by several nodes, or made of several dimensions that change
                continue
            done.add((*key, member.axis))
            tensor = member.value.const_value
            assert tensor is not None
            array = arrays.get(key, tensor.numpy())
            arrays[key] = _take(array, taken[member], member.axis, _new(member))
        self._store(arrays)
        return taken

    def _store(self, arrays: Mapping[tuple[ir.Value, ir.Node | None, int | None], np.ndarray]) -> None:
        for (value, node, index), array in arrays.items():
            if node is None or index is None or (len(value.uses()) == 1 and not value.is_graph_output()):
                value.const_value = ir.Tensor(np.ascontiguousarray(array), name=value.name, dtype=value.dtype)
                value.shape = ir.Shape(array.shape)
            else:
                name = self._names.free(f"{value.name}/{label(node)}")
                node.replace_input_with(index, add_initializer(self._graph, name, array, value.dtype))

    def freeze(self) -> None:
        """Replaces what is computed from fixed lengths alone by its value, which is to stay as lengths change."""
        relations = self._dimensions.relations
        for node in list(self._graph.model.graph):
            value = node.outputs[0]
            computed = relations.computed(value)
            if computed is None or not computed.fixed.all() or value.is_graph_output():
                continue
            frozen: ir.Value | None = None
            for user, index in list(value.uses()):
                further = relations.computed(user.outputs[0])
                if further is None or not further.fixed.all():
                    name = f"{value.name}/fixed"
                    frozen = frozen or add_initializer(self._graph, self._names.free(name), computed.array)
                    user.replace_input_with(index, frozen)

    def numbers(self) -> None:
        """Adjusts attributes that tell sizes, and where Slice and Split cut."""
        relations = self._dimensions.relations
        for node, told in relations.attributes.items():
            for name, term in told.items():
                if self._changes(term):
                    node.attributes[name] = ir.AttrInt64(name, size_after(term, self._sizes))
        for node, parts in relations.splits.items():
            if any(map(self._changes, parts)):
                self._split(node, [size_after(part, self._sizes) for part in parts])
        for node, cuts in relations.cuts.items():
            if any(self._changes(term) for cut in cuts.values() for term in cut):
                self._slice(node, cuts)
        for node, pieces in relations.places.items():
            index = relations.constant(node, 1)
            if index is not None and any(map(self._changes, pieces)):
                self._give(node, 1, np.full_like(index, size_after(pieces[0], self._sizes)))

    def _split(self, node: ir.Node, lengths: list[int]) -> None:
        found = self._dimensions.relations.integers(node, 1, "split")
        if found == lengths or (found is None and len(set(lengths)) == 1):
            return
        if self._graph.opset < 13:
            node.attributes["split"] = ir.AttrInt64s("split", lengths)
            return
        node.attributes.pop("num_outputs", None)
        self._give(node, 1, np.array(lengths))

    def _slice(self, node: ir.Node, cuts: Mapping[int, list[Term]]) -> None:
        relations = self._dimensions.relations
        starts, ends = relations.integers(node, 1, "starts") or [], relations.integers(node, 2, "ends") or []
        rank = len(relations.sizes(node.inputs[0]) or ())
        axes = relations.integers(node, 3, "axes")
        for place, axis in enumerate(range(len(starts)) if axes is None else axes):
            pieces = cuts.get(axis % rank, [])
            if any(map(self._changes, pieces)):
                before, taken, _ = (size_after(term, self._sizes) for term in pieces)
                starts[place], ends[place] = before, before + taken
        if self._graph.opset < 10:
            node.attributes["starts"] = ir.AttrInt64s("starts", starts)
            node.attributes["ends"] = ir.AttrInt64s("ends", ends)
        else:
            self._give(node, 1, np.array(starts))
            self._give(node, 2, np.array(ends))

    def shapes(self) -> None:
        """Adjusts the shapes that Reshape, Expand and their like are given, and forgets those of activations."""
        for node, (index, terms) in self._dimensions.relations.shapes.items():
            value, changes = node.inputs[index], any(map(self._changes, terms))
            computed = self._dimensions.relations.computed(value)
            if value is not None and computed is not None and not is_constant(value):
                if changes or not self._is_told(value, computed):
                    self._join(node, index, value, computed, terms)
            elif changes:
                self._give(node, index, self._entries(node, self._constant(value), terms))
        RemoveUnusedNodesPass()(self._graph.model)
        carried = {m.value for dim in self._chosen for m in self._dimensions.group(dim).of("carries")}
        for value in carried:
            if not value.is_graph_input() and not value.is_graph_output():
                value.shape = None
        self._graph.infer()

    def _is_told(self, value: ir.Value, computed: Computed) -> bool:
        """Whether all that is fixed in a computed shape is a constant already, and not read from a tensor."""
        pieces = self._pieces(value)
        return bool(pieces) and all(is_constant(p) for p, fixed in zip(pieces, computed.fixed, strict=True) if fixed)

    def _pieces(self, value: ir.Value) -> Sequence[ir.Value | None]:
        """The single entries that a shape is joined of; none where it is made in another way."""
        producer = value.producer()
        joined = producer.inputs if producer is not None and producer.op_type == "Concat" else ()
        return joined if [len(joined)] == self._dimensions.relations.sizes(value) else ()

    def _join(self, node: ir.Node, index: int, value: ir.Value, computed: Computed, terms: list[Term]) -> None:
        """Gives a node a shape with what is fixed as numbers; other lengths are taken from the shape that it had."""
        pieces: list[ir.Value] = []
        numbers = self._entries(node, computed.array, terms)
        for fixed, run in itertools.groupby(range(len(terms)), lambda place: bool(computed.fixed[place])):
            places = list(run)
            if fixed:
                pieces.append(self._number(node, numbers[places]))
            else:
                pieces.extend(self._followed(node, value, place, terms[place]) for place in places)
        if len(pieces) > 1:
            pieces = [self._insert(node, "Concat", pieces, axis=0)]
        node.replace_input_with(index, pieces[0])

    def _followed(self, node: ir.Node, value: ir.Value, place: int, term: Term) -> ir.Value:
        """One entry of a computed shape, times what the term grows or shrinks by."""
        pieces = self._pieces(value)
        piece = pieces[place] if pieces else None
        if piece is None:
            piece = self._insert(node, "Gather", [value, self._number(node, np.array([place]))], axis=0)
        if self._changes(term):
            old = self._number(node, np.array([resolved(term).size]))
            new = self._number(node, np.array([size_after(term, self._sizes)]))
            piece = self._insert(node, "Div", [self._insert(node, "Mul", [piece, new]), old])
        return piece

    def _entries(self, node: ir.Node, numbers: np.ndarray, terms: list[Term]) -> np.ndarray:
        """Entries that tell the old length tell the new one; -1, and 0 for a length that is not fixed, follow suit."""
        result = numbers.astype(np.int64)
        fixed = self._dimensions.relations.fixed(node.outputs[0]) or [False] * len(terms)
        for place, term in enumerate(terms):
            if self._changes(term) and (result[place] > 0 or (result[place] == 0 and fixed[place])):
                result[place] = size_after(term, self._sizes)
        return result

    def _give(self, node: ir.Node, index: int, numbers: np.ndarray) -> None:
        """Gives a node whole numbers of its own as an input."""
        if len(node.inputs) <= index:
            node.resize_inputs(index + 1)
        node.replace_input_with(index, self._number(node, numbers))

    def _number(self, node: ir.Node, numbers: np.ndarray) -> ir.Value:
        return add_initializer(self._graph, self._names.free(f"{label(node)}/size"), numbers.astype(np.int64))

    def _insert(self, node: ir.Node, operator: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        """A new node before another one."""
        made = ir.node(operator, inputs, attributes=attributes)
        made.outputs[0].name = made.name = self._names.free(f"{label(node)}/shape")
        self._graph.model.graph.insert_before(node, made)
        return made.outputs[0]

    def _constant(self, value: ir.Value | None) -> np.ndarray:
        assert value is not None
        assert value.const_value is not None
        return value.const_value.numpy()

    def _changes(self, term: Term) -> bool:
        return any(dim in self._chosen for dim in leaves(term))


def new_number(node: ir.Node, index: int) -> int:
    """What new positions of a constant hold that a node reads: 0, or what stands for it where it is quantized."""
    if (place := _ZERO_POINTS.get((node.op_type, index))) is not None:
        value = node.inputs[place] if place < len(node.inputs) else None
        points = value.const_value.numpy() if value is not None and value.const_value is not None else np.zeros(1)
        return int(points.flat[0]) if (points == points.flat[0]).all() else 0
    return 1 if (node.op_type, index) in _ONES else 0


def _new(member: Member) -> int:
    if member.node is None:
        return 0
    index = next(place for place, value in enumerate(member.node.inputs) if value is member.value)
    return new_number(member.node, index if member.index is None else member.index)


def _take(array: np.ndarray, places: np.ndarray, axis: int, new: int) -> np.ndarray:
    result: np.ndarray = np.take(array, np.maximum(places, 0), axis=axis)
    if (places < 0).any():
        where: list[slice | np.ndarray] = [slice(None)] * array.ndim
        where[axis] = places < 0
        result = result.copy()
        result[tuple(where)] = new
    return result
