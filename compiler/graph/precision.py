"""Lowers a graph's float32 tensors to a smaller float type, with casts where precisions meet.

Each operand of a node is lowered where the operator's schema allows it, unless the node is marked by `keep`. A value
has the precision that its producer gives it; uses that want the other take it through one Cast, which they share. A
branch or loop body exchanges values with the graph around it in the precision of the node that owns it.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from .editing import Names
from .graph import Graph
from .identity import MARK
from .schemas import type_text
from .verifier import Scope, subgraphs

HEAVY = frozenset((
    "Attention", "Conv", "ConvTranspose", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "MultiHeadAttention", "RNN",
))  # fmt: skip
"""Operators whose precision decides the speed."""

_TAKES_ANY = frozenset(("Cast", "Shape", "Size"))
_DTYPE_ATTRIBUTES = ("dtype", "output_datatype", "output_dtype", "to")
_Use = tuple[ir.Node, int]


def keep(node: ir.Node, reason: str) -> None:
    """Marks a node to stay in float32, for this and for every later lowering; the first reason counts."""
    node.metadata_props.setdefault(MARK, reason)


def kept(node: ir.Node) -> str | None:
    """Why a node stays in float32; None where it does not."""
    return node.metadata_props.get(MARK)


def is_float(value: ir.Value | None) -> bool:
    """Whether this is a float32 tensor."""
    return value is not None and isinstance(value.type, ir.TensorType) and value.dtype == ir.DataType.FLOAT


class Lowering:
    """What becomes of each operand and value of a graph without functions.

    Attributes:
        lowered: how many nodes `apply` lowered.
        casts: how many Cast nodes it put in.
    """

    def __init__(self, graph: Graph, dtype: ir.DataType, *, keep_io: bool) -> None:
        self._graph = graph
        self._type = ir.TensorType(dtype)
        self._keep_io = keep_io
        self._scope = Scope(graph.model.opset_imports, {})
        self._owners = {inner: node for node in graph.nodes() for inner in subgraphs(node)}
        self._names = Names(graph)
        self.lowered = 0
        self.casts = 0

    def legal(self, node: ir.Node) -> bool | None:
        """Whether the operator takes the lower type in any of its float32 operands; None where it has none."""
        allowed = [self._allows(node, index, output=output) for index, output in _float_operands(node)]
        return any(allowed) if allowed else None

    def pending(self) -> bool:
        """Whether `apply` has anything to lower."""
        return any(map(self.takes, self._graph.nodes()))

    def takes(self, node: ir.Node) -> bool:
        """Whether any operand of a node becomes the lower type. Casts are put in; Shape and Size read either type."""
        if node.op_type in _TAKES_ANY and node.domain == "":
            return False
        return any(self.lowers(node, index, output=output) for index, output in _float_operands(node))

    def _allows(self, node: ir.Node, index: int, *, output: bool) -> bool:
        schema = self._scope.schema(node)
        return schema is not None and schema.allows(schema.parameter(index, output=output), str(type_text(self._type)))

    def lowers(self, node: ir.Node, index: int, *, output: bool = False) -> bool:
        """Whether a float32 operand of a node becomes the lower type."""
        value = (node.outputs if output else node.inputs)[index]
        if not is_float(value) or kept(node) is not None or not self._allows(node, index, output=output):
            return False
        if output and value is not None and node.op_type == "Cast":  # only if nobody asks for float32
            wants = [self._wants(use) for use in value.uses()] + self._wants_as_output(value)
            return bool(wants) and all(want is not False for want in wants) and any(wants)
        return True

    def apply(self) -> None:
        """Rewrites the graph."""
        operands = [(node, index, output) for node in self._graph.nodes() for index, output in _float_operands(node)]
        self.lowered = len({node for node, index, output in operands if self.lowers(node, index, output=output)})
        values = [value for scope in self._graph.graphs() for value in _values(scope) if is_float(value)]
        plans = [(value, self._produces(value), *self._uses(value)) for value in values]
        for value, low, low_uses, full_uses in plans:
            if value.is_initializer() and not value.is_graph_input():
                self._convert_weight(value, low_uses, full_uses)
                continue
            if low:
                self._set_type(value)
            self._insert_cast(value, low_uses if not low else full_uses, low=not low)
        self._drop_idle_casts()

    def _produces(self, value: ir.Value) -> bool:
        if (producer := value.producer()) is not None:
            return self.lowers(producer, value.index() or 0, output=True)
        owner = self._owners.get(value.graph) if value.graph is not None else None
        if owner is not None:
            return kept(owner) is None
        return not self._keep_io and not any(kept(use.node) for use in value.uses())

    def _uses(self, value: ir.Value) -> tuple[list[_Use | int], list[_Use | int]]:
        """The uses that want the lower type, and those that want float32; a number is a place in the outputs."""
        wanted: dict[bool | None, list[_Use | int]] = collections.defaultdict(list)
        for node, index in value.uses():
            wanted[self._wants((node, index))].append((node, index))
        for index, want in zip(_places(value), self._wants_as_output(value), strict=True):
            wanted[want].append(index)
        return wanted[True], wanted[False]

    def _wants(self, use: _Use) -> bool | None:
        """Whether a use wants the lower type; None where it takes either."""
        node, index = use
        return None if node.op_type in _TAKES_ANY and node.domain == "" else self.lowers(node, index)

    def _wants_as_output(self, value: ir.Value) -> list[bool | None]:
        owner = self._owners.get(value.graph) if value.graph is not None else None
        want = kept(owner) is None if owner is not None else (False if self._keep_io else None)
        return [want for _ in _places(value)]

    def _set_type(self, value: ir.Value) -> None:
        value.type = self._type
        if value.const_value is not None:
            value.const_value = _converted(value.const_value, self._type.dtype)
        node = value.producer()
        if node is None:
            return
        legal = self._scope.schema(node)
        for name in _DTYPE_ATTRIBUTES:
            if legal is not None and name in legal.attributes:
                node.attributes[name] = ir.AttrInt64(name, self._type.dtype.value)
        if node.op_type in ("Constant", "ConstantOfShape"):
            given = next(iter(node.attributes.values()), None)
            numbers = [0.0] if given is None else given.value
            fill = numbers if isinstance(numbers, ir.TensorProtocol) else ir.Tensor(np.array(numbers, np.float32))
            node.attributes.clear()
            node.attributes["value"] = ir.AttrTensor("value", _converted(fill, self._type.dtype))

    def _convert_weight(self, value: ir.Value, low_uses: list[_Use | int], full_uses: list[_Use | int]) -> None:
        if not low_uses or value.const_value is None:
            return
        tensor = _converted(value.const_value, self._type.dtype)
        if not full_uses:
            value.type, value.const_value = self._type, tensor
            return
        copy = ir.Value(name=self._name(value), type=self._type, shape=value.shape, const_value=tensor)
        _owner_graph(value).register_initializer(copy)
        _redirect(value, copy, low_uses)

    def _insert_cast(self, value: ir.Value, uses: list[_Use | int], *, low: bool) -> None:
        if not uses:
            return
        graph = _owner_graph(value)
        target = self._type.dtype if low else ir.DataType.FLOAT
        name = self._name(value)
        node = ir.node("Cast", [value], {"to": target.value}, name=f"Cast/{name}")
        result = node.outputs[0]
        result.name, result.type, result.shape = name, ir.TensorType(target), value.shape
        if (producer := value.producer()) is not None:
            graph.insert_after(producer, node)
        elif len(graph):
            graph.insert_before(graph[0], node)
        else:
            graph.append(node)
        _redirect(value, result, uses)
        if any(isinstance(use, int) for use in uses):  # the name of an output stays with the output
            value.name, result.name = name, value.name
        self.casts += 1

    def _drop_idle_casts(self) -> None:
        """Removes casts to the type that their input has already."""
        for scope in self._graph.graphs():
            for node in list(scope):
                if node.op_type != "Cast" or node.domain or node.inputs[0] is None:
                    continue
                source, result = node.inputs[0], node.outputs[0]
                if source.dtype == node.attributes["to"].as_int() and not result.is_graph_output():
                    result.replace_all_uses_with(source)
                    scope.remove(node, safe=True)

    def _name(self, value: ir.Value) -> str:
        return self._names.free(f"{value.name}/{self._type.dtype.name.lower()}")


def _float_operands(node: ir.Node) -> Iterator[tuple[int, bool]]:
    """Places of a node's float32 inputs, then outputs, with whether it is an output."""
    yield from ((index, False) for index, value in enumerate(node.inputs) if is_float(value))
    yield from ((index, True) for index, value in enumerate(node.outputs) if is_float(value))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from (value for value in list(graph.initializers.values()) if not value.is_graph_input())
    for node in graph:
        yield from node.outputs


def _owner_graph(value: ir.Value) -> ir.Graph:
    if value.graph is None:
        raise ValueError(f"tensor {value.name!r} belongs to no graph")
    return value.graph


def _places(value: ir.Value) -> list[int]:
    outputs = value.graph.outputs if value.graph is not None and value.is_graph_output() else []
    return [index for index, output in enumerate(outputs) if output is value]


def _redirect(value: ir.Value, replacement: ir.Value, uses: list[_Use | int]) -> None:
    for use in uses:
        if isinstance(use, int):
            _owner_graph(value).outputs[use] = replacement
        else:
            use[0].replace_input_with(use[1], replacement)


def _converted(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    """Rounds to nearest; what is beyond the range becomes infinite."""
    with np.errstate(over="ignore"):
        return ir.Tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype, name=tensor.name)
