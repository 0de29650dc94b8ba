"""Conv, Gemm and MatMul as what they have in common: y = W x + b over channels, with W and b constant.

Constants are initializers here; lift Constant nodes first. Only the main graph is looked at.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from ..graph import Graph
from ..graph.editing import Names, add_initializer, is_constant
from ..graph.selection import label

_TRANSPOSED = (1, 0)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A node with constant weights, seen as (out, in/groups, *kernel) whatever layout its initializer has."""

    node: ir.Node

    @property
    def name(self) -> str:
        """The node's name, or its output's where it has none."""
        return label(self.node)

    @property
    def weight(self) -> ir.Value:
        """The initializer that holds W, input 1 of the node."""
        return operand(self.node, 1)

    @property
    def groups(self) -> int:
        """Groups of a Conv; 1 for the others."""
        return self.node.attributes.get_int("group", 1) if self.node.op_type == "Conv" else 1

    @property
    def transposed(self) -> bool:
        """Whether the initializer is (in, out)."""
        return self.node.op_type == "MatMul" or (
            self.node.op_type == "Gemm" and not self.node.attributes.get_int("transB", 0)
        )

    @property
    def output_axis(self) -> int:
        """The initializer's axis over output channels."""
        return 1 if self.transposed else 0

    def channel_axis(self, rank: int) -> int:
        """The axis over channels of inputs and outputs of this rank."""
        return 1 if self.node.op_type == "Conv" else rank - 1

    def load(self) -> np.ndarray:
        """The weights as (out, in/groups, *kernel)."""
        return self.viewed(constant(self.weight))

    def viewed(self, array: np.ndarray) -> np.ndarray:
        """From the initializer's layout to (out, in/groups, *kernel); its own inverse."""
        return array.transpose(_TRANSPOSED) if self.transposed else array

    def store(self, array: np.ndarray) -> None:
        """Replaces the weights by an array (out, in/groups, *kernel)."""
        assign(self.weight, self.viewed(array))

    def output_range(self) -> np.ndarray:
        """Largest magnitude of the weights of each output channel."""
        weight = np.abs(self.load())
        return np.asarray(weight.max(axis=tuple(range(1, weight.ndim))))

    def input_range(self) -> np.ndarray:
        """Largest magnitude of the weights that read each input channel."""
        weight = np.abs(self.load())
        grouped = weight.reshape(self.groups, -1, weight.shape[1], math.prod(weight.shape[2:]))
        return np.asarray(grouped.max(axis=(1, 3)).reshape(-1))

    def scale_inputs(self, factor: np.ndarray) -> None:
        """Multiplies the weights that read input channel i by factor[i]."""
        weight = self.load()
        grouped = weight.reshape(self.groups, -1, weight.shape[1], math.prod(weight.shape[2:]))
        scaled = grouped * factor.reshape(self.groups, 1, weight.shape[1], 1)
        self.store(scaled.reshape(weight.shape).astype(weight.dtype))


def layers(graph: Graph) -> Iterator[Layer]:
    """The layers of the main graph, in its order."""
    return (layer for node in graph.model.graph if (layer := as_layer(node)) is not None)


def as_layer(node: ir.Node) -> Layer | None:
    """A layer for a node that is one: float32 weights in an initializer, no transposed input, no factors."""
    if node.domain or node.op_type not in ("Conv", "Gemm", "MatMul") or not is_weight(node.inputs[1]):
        return None
    rank = len(operand(node, 1).shape or ())
    if node.op_type == "Conv":
        return Layer(node) if rank > 2 else None
    if rank != 2 or node.inputs[0] is None or is_weight(node.inputs[0]):
        return None
    attributes = node.attributes
    plain = not attributes.get_int("transA", 0) and all(attributes.get_float(k, 1.0) == 1 for k in ("alpha", "beta"))
    return Layer(node) if plain else None


def is_weight(value: ir.Value | None) -> bool:
    """Whether a value is a float32 initializer that no caller may replace."""
    tensor = value.const_value if value is not None and is_constant(value) else None
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT


def is_shared(value: ir.Value) -> bool:
    """Whether a value is used more than once, or is an output too."""
    return len(value.uses()) + value.is_graph_output() > 1


def constant(value: ir.Value) -> np.ndarray:
    """The array of an initializer."""
    if value.const_value is None:
        raise ValueError(f"{value.name!r} is no constant")
    return value.const_value.numpy()


def assign(value: ir.Value, array: np.ndarray) -> None:
    """Gives an initializer other numbers."""
    value.const_value = ir.Tensor(np.ascontiguousarray(array), name=value.name)
    value.shape = ir.Shape(array.shape)


def assign_input(node: ir.Node, index: int, array: np.ndarray, graph: Graph) -> None:
    """Gives one input of one node other numbers; an initializer that others use too is left to them."""
    value = operand(node, index)
    if not is_shared(value):
        assign(value, array)
        return
    node.replace_input_with(index, initializer(graph, f"{value.name}/{label(node)}", array))


def initializer(graph: Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new float32 initializer of the main graph; the name is made unique."""
    return add_initializer(graph, free_name(graph, name), np.ascontiguousarray(array, dtype=np.float32))


def free_name(graph: Graph, name: str) -> str:
    """`name`, with a number where a value has that name already."""
    return Names(graph).free(name)


def operand(node: ir.Node, index: int) -> ir.Value:
    """An input that is not left out."""
    value = node.inputs[index]
    if value is None:
        raise ValueError(f"input {index} of {label(node)!r} is left out")
    return value
