"""How long axes are, and what numbers are computed from their lengths.

Shapes are inferred twice, with other lengths for the dynamic axes: primes, so that no product of fixed lengths equals
one by chance. What is the same both times is fixed; exporters compute much of that at run time, as in Shape, Gather,
Concat, Reshape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
from onnx import shape_inference

from ..graph import Graph
from ..graph.editing import is_constant

_LARGE = (59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107)
_SMALL = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43)
"""Small enough for tables of positions, too, which are as long as the longest input."""

_ELEMENTS = 16
"""Whole numbers up to this count are computed, and single floats: weights that lengths are mixed into are no shapes."""

Lengths = list[int | None]
Evaluator = Callable[[ir.Node, list[np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Computed:
    """Numbers that depend on shapes alone.

    Attributes:
        array: at the large lengths.
        fixed: for each number, whether it is the same at all lengths.
    """

    array: np.ndarray
    fixed: np.ndarray


class Sizes:
    """Lengths and computed numbers of a graph, by the name of the tensor.

    Args:
        graph: flat, its shapes inferred as far as they can be.
    """

    def __init__(self, graph: Graph) -> None:
        large, small = _Walk(graph, _LARGE), _Walk(graph, _SMALL)
        self.lengths: Mapping[str, Lengths] = large.lengths
        self.fixed: Mapping[str, list[bool]] = {
            name: _same(lengths, small.lengths.get(name)) for name, lengths in large.lengths.items()
        }
        self.computed: Mapping[str, Computed] = {
            name: Computed(array, _equal(array, small.arrays.get(name))) for name, array in large.arrays.items()
        }


def _same(lengths: Lengths, others: Lengths | None) -> list[bool]:
    if others is None or len(others) != len(lengths):
        return [False] * len(lengths)
    return [one is not None and one == other for one, other in zip(lengths, others, strict=True)]


def _equal(array: np.ndarray, other: np.ndarray | None) -> np.ndarray:
    if other is None or other.shape != array.shape:
        return np.zeros(array.shape, bool)
    return np.asarray(array == other)


class _Walk:
    """The graph from front to back, with lengths for its dynamic axes. Where they cannot be, what is known remains."""

    def __init__(self, graph: Graph, primes: tuple[int, ...]) -> None:
        main = graph.model.graph
        names = dict.fromkeys(
            _name(value, place)
            for value in main.inputs
            for place, axis in enumerate(value.shape or ())
            if not isinstance(axis, int)
        )
        self._chosen = {name: primes[place % len(primes)] for place, name in enumerate(names)}
        self._opsets = dict(graph.model.opset_imports)
        self._types: dict[str, onnx.TypeProto] = {}
        self.lengths: dict[str, Lengths] = {}
        self.arrays: dict[str, np.ndarray] = {}
        for value in main.inputs:
            self._set(value, self._declared(value))
        for node in main:
            self._visit(node)

    def _declared(self, value: ir.Value) -> Lengths | None:
        """What the graph itself knows of a value."""
        if value.shape is None:
            return None
        return [
            axis if isinstance(axis, int) else self._chosen.get(_name(value, place))
            for place, axis in enumerate(value.shape)
        ]

    def _set(self, value: ir.Value, lengths: Lengths | None) -> None:
        if lengths is None:
            return
        name, dtype = value.name or "", 0 if value.dtype is None else int(value.dtype)
        self.lengths[name] = lengths
        self._types[name] = onnx.helper.make_tensor_type_proto(dtype, lengths)

    def _visit(self, node: ir.Node) -> None:
        if (array := self._evaluate(node)) is not None:
            value = node.outputs[0]
            self.arrays[value.name or ""] = array
            self._set(value, list(array.shape))
            return
        found = self._infer(node)
        for value in node.outputs:
            inferred, declared = found.get(value.name or ""), self._declared(value)
            if inferred is None or not inferred.tensor_type.HasField("shape"):
                self._set(value, declared)
                continue
            dims = inferred.tensor_type.shape.dim
            known = declared if declared is not None and len(declared) == len(dims) else [None] * len(dims)
            self._set(value, [d.dim_value if d.HasField("dim_value") else k for d, k in zip(dims, known, strict=True)])

    def _infer(self, node: ir.Node) -> Mapping[str, onnx.TypeProto]:
        """Types of the outputs; none where these lengths cannot be, or onnx does not know the operator."""
        try:
            schema = onnx.defs.get_schema(node.op_type, self._opsets.get(node.domain, 1), node.domain)
        except onnx.defs.SchemaError:
            return {}
        types: dict[str, onnx.TypeProto] = {}
        data: dict[str, onnx.TensorProto] = {}
        for value in filter(None, node.inputs):
            name = value.name or ""
            if (array := self._array(value)) is not None:
                data[name] = onnx.numpy_helper.from_array(array, name)
            if name in self._types:
                types[name] = self._types[name]
            elif value.const_value is not None:
                shape = list(value.const_value.shape.numpy())
                types[name] = onnx.helper.make_tensor_type_proto(int(value.const_value.dtype), shape)
            else:
                return {}
        imports = [onnx.helper.make_opsetid(domain, version) for domain, version in self._opsets.items()]
        try:
            return dict(
                shape_inference.infer_node_outputs(
                    schema, ir.serde.serialize_node(node), types, data, opset_imports=imports
                )
            )
        except (shape_inference.InferenceError, onnx.checker.ValidationError):
            return {}

    def _array(self, value: ir.Value) -> np.ndarray | None:
        """The numbers of a constant, or that were computed, where they are few."""
        if (value.name or "") in self.arrays:
            return self.arrays[value.name or ""]
        if not is_constant(value) or value.const_value is None or value.const_value.size > _ELEMENTS:
            return None
        return value.const_value.numpy()

    def _evaluate(self, node: ir.Node) -> np.ndarray | None:
        if node.domain:
            return None
        if node.op_type in ("Shape", "Size"):
            return self._measure(node)
        evaluate = EVALUATORS.get(node.op_type)
        if evaluate is None or not any(value is not None and value.name in self.arrays for value in node.inputs):
            return None
        arrays = [None if value is None else self._array(value) for value in node.inputs]
        if any(array is None for array in arrays):
            return None
        try:
            result = evaluate(node, [array for array in arrays if array is not None])
        except (IndexError, ValueError):  # lengths that the graph cannot take
            return None
        return result if result.size <= (1 if result.dtype.kind == "f" else _ELEMENTS) else None

    def _measure(self, node: ir.Node) -> np.ndarray | None:
        lengths = self.lengths.get((node.inputs[0].name if node.inputs[0] else None) or "")
        if lengths is None:
            return None
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(lengths))
        known = [length for length in lengths[start:end] if length is not None]
        if len(known) < len(lengths[start:end]):
            return None
        return np.array(known if node.op_type == "Shape" else np.prod(known), np.int64)


def _name(value: ir.Value, place: int) -> str:
    """What a dynamic axis goes by: its own name, or that of the tensor and its place."""
    axis = value.shape[place] if value.shape is not None else None
    named = isinstance(axis, ir.SymbolicDim) and axis.value is not None
    return str(axis.value) if named else f"{value.name}:{place}"  # type: ignore[union-attr]


def _axes(node: ir.Node, inputs: list[np.ndarray]) -> tuple[int, ...]:
    found = inputs[1].reshape(-1) if len(inputs) > 1 else node.attributes.get_ints("axes", ()) or ()
    return tuple(int(axis) for axis in found)


def _unsqueeze(node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray:
    return np.expand_dims(inputs[0], _axes(node, inputs))


def _squeeze(node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray:
    return np.squeeze(inputs[0], _axes(node, inputs) or None)


def _slice(node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray:
    data, *rest = inputs
    if not rest:
        rest = [np.array(node.attributes.get_ints(name, ())) for name in ("starts", "ends")]
        rest += [np.array(node.attributes.get_ints("axes", range(len(rest[0]))))]
    starts, ends = (numbers.reshape(-1) for numbers in rest[:2])
    axes = rest[2].reshape(-1) if len(rest) > 2 else np.arange(len(starts))
    steps = rest[3].reshape(-1) if len(rest) > 3 else np.ones(len(starts), int)
    where = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        where[axis] = slice(int(start), None if step < 0 and end < -data.shape[axis] else int(end), int(step))
    return data[tuple(where)]


def _divide(node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray:
    if np.issubdtype(inputs[0].dtype, np.integer):
        return np.asarray(inputs[0] // np.where(inputs[1] == 0, 1, inputs[1]))  # lengths are never negative
    return np.asarray(inputs[0] / inputs[1])


def _gather(node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray:
    return np.asarray(np.take(inputs[0], inputs[1], axis=node.attributes.get_int("axis", 0)))


def _cast(node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray:
    return inputs[0].astype(ir.DataType(node.attributes.get_int("to", 1)).numpy())


def _concat(node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(inputs, axis=node.attributes.get_int("axis", 0))


EVALUATORS: Mapping[str, Evaluator] = {
    "Add": lambda node, inputs: np.asarray(inputs[0] + inputs[1]),
    "Cast": _cast,
    "Ceil": lambda node, inputs: np.ceil(inputs[0]),
    "Concat": _concat,
    "Div": _divide,
    "Equal": lambda node, inputs: np.asarray(inputs[0] == inputs[1]),
    "Floor": lambda node, inputs: np.floor(inputs[0]),
    "Gather": _gather,
    "Identity": lambda node, inputs: inputs[0],
    "Max": lambda node, inputs: np.asarray(np.maximum.reduce(np.broadcast_arrays(*inputs))),
    "Min": lambda node, inputs: np.asarray(np.minimum.reduce(np.broadcast_arrays(*inputs))),
    "Mul": lambda node, inputs: np.asarray(inputs[0] * inputs[1]),
    "Reshape": lambda node, inputs: inputs[0].reshape(inputs[1]),
    "Slice": _slice,
    "Sqrt": lambda node, inputs: np.sqrt(inputs[0]),
    "Squeeze": _squeeze,
    "Sub": lambda node, inputs: np.asarray(inputs[0] - inputs[1]),
    "Unsqueeze": _unsqueeze,
    "Where": lambda node, inputs: np.where(inputs[0], inputs[1], inputs[2]),
}
"""Operators that shapes are computed with."""

MOVES = frozenset(("Cast", "Concat", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze"))
"""Those of them that leave each number by itself."""
