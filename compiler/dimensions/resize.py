"""Changes the size of dimensions wherever they stand: in weights, and in what tells sizes in attributes and shapes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ..graph.editing import Names, add_initializer, is_constant
from ..graph.selection import label
from .analysis import Dimensions, Member
from .layout import Dim, Term, leaves, positions, size_after
from .relations import integers
from .shapes import shape_entries

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
    run = _Resizing(dimensions, chosen)
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

    def numbers(self) -> None:
        """Adjusts attributes that tell sizes, and where Slice and Split cut."""
        for node, told in self._dimensions.relations.attributes.items():
            cuts: dict[int, tuple[int, int]] = {}
            for name, term in told.items():
                if name.startswith("slice "):
                    before, inside = self._after(term)
                    cuts[int(name.split()[1])] = before, before + inside
                elif name == "split":
                    self._split(node, self._after(term))
                elif not isinstance(term, list) and self._changes(term):
                    node.attributes[name] = ir.AttrInt64(name, size_after(term, self._sizes))
            if cuts and any(self._changes(part) for term in told.values() for part in _listed(term)):
                self._slice(node, cuts)

    def _split(self, node: ir.Node, lengths: list[int]) -> None:
        found = integers(node, 1, "split")
        if found == lengths or (found is None and len(set(lengths)) == 1):
            return
        if self._graph.opset < 13:
            node.attributes["split"] = ir.AttrInt64s("split", lengths)
            return
        node.attributes.pop("num_outputs", None)
        self._give(node, 1, np.array(lengths))

    def _slice(self, node: ir.Node, cuts: Mapping[int, tuple[int, int]]) -> None:
        starts, ends = integers(node, 1, "starts") or [], integers(node, 2, "ends") or []
        rank = len(node.inputs[0].shape or ()) if node.inputs[0] is not None else 0
        axes = integers(node, 3, "axes")
        for place, axis in enumerate(range(len(starts)) if axes is None else axes):
            if axis % rank in cuts:
                starts[place], ends[place] = cuts[axis % rank]
        if self._graph.opset < 10:
            node.attributes["starts"] = ir.AttrInt64s("starts", starts)
            node.attributes["ends"] = ir.AttrInt64s("ends", ends)
        else:
            self._give(node, 1, np.array(starts))
            self._give(node, 2, np.array(ends))

    def shapes(self) -> None:
        """Adjusts the shapes that Reshape, Expand and Resize are given, and forgets those of activations."""
        for node, told in self._dimensions.relations.attributes.items():
            for name, index in (("shape", 1), ("sizes", 3)):
                terms = told.get(name)
                if isinstance(terms, list) and any(map(self._changes, terms)):
                    self._shape(node, index, terms)
        carried = {m.value for dim in self._chosen for m in self._dimensions.group(dim).of("carries")}
        for value in carried:
            if not value.is_graph_input() and not value.is_graph_output():
                value.shape = None
        self._graph.infer()

    def _shape(self, node: ir.Node, index: int, terms: list[Term]) -> None:
        value = node.inputs[index]
        assert value is not None
        if is_constant(value) and value.const_value is not None:
            self._give(node, index, self._entries(value.const_value.numpy(), terms, range(len(terms))))
            return
        producer = value.producer()
        entries = shape_entries(producer) if producer is not None else None
        if producer is None or entries is None:  # a Shape follows by itself
            return
        inputs = list(producer.inputs)
        for place in {entry[0] for entry in entries if entry is not None}:
            here = [at for at, entry in enumerate(entries) if entry is not None and entry[0] == place]
            part = inputs[place]
            assert part is not None
            assert part.const_value is not None
            numbers = self._entries(part.const_value.numpy(), terms, here)
            if not np.array_equal(numbers, part.const_value.numpy()):
                inputs[place] = add_initializer(self._graph, self._names.free(f"{label(node)}/shape"), numbers)
        joined = ir.node("Concat", inputs, attributes={"axis": 0})  # others may share the one that was there
        joined.outputs[0].name = self._names.free(f"{label(node)}/shape")
        self._graph.model.graph.insert_before(node, joined)
        node.replace_input_with(index, joined.outputs[0])

    def _entries(self, numbers: np.ndarray, terms: list[Term], places: range | list[int]) -> np.ndarray:
        """Entries that tell the old length tell the new one; 0 and -1 follow by themselves."""
        result = numbers.copy()
        for own, place in enumerate(places):
            if self._changes(terms[place]) and result[own] > 0:
                result[own] = size_after(terms[place], self._sizes)
        return result

    def _give(self, node: ir.Node, index: int, numbers: np.ndarray) -> None:
        """Gives a node whole numbers of its own as an input."""
        while len(node.inputs) <= index:
            node.resize_inputs(index + 1)
        name = self._names.free(f"{label(node)}/{index}")
        node.replace_input_with(index, add_initializer(self._graph, name, numbers.astype(np.int64)))

    def _after(self, term: Term | list[Term]) -> list[int]:
        return [size_after(part, self._sizes) for part in _listed(term)]

    def _changes(self, term: Term) -> bool:
        return any(dim in self._chosen for dim in leaves(term))


def _listed(term: Term | list[Term]) -> list[Term]:
    return term if isinstance(term, list) else [term]


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
