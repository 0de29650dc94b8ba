"""Puts QuantizeLinear and DequantizeLinear into a graph, and tells whether a graph has them already.

x -> f                ->   x -> QuantizeLinear -> DequantizeLinear -> f          an activation; uses share the pair
W -> f                ->   W as int8 -> DequantizeLinear -> f                    a constant
b -> f                ->   b as int32 -> DequantizeLinear -> f                   a bias
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from ..graph import Graph
from ..graph.editing import Names, add_initializer
from .parameters import Parameters
from .plan import Bias, Plan, Use, Weight

_OPERATORS = frozenset((
    "ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul",
    "QuantizeLinear",
))  # fmt: skip
_ASKING_SIZE = frozenset(("Shape", "Size"))
_CONTRIBUTED = frozenset(("DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits"))


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """A constant in numbers of its parameters' dtype; the array has the shape of the constant."""

    array: np.ndarray
    parameters: Parameters

    @classmethod
    def nearest(cls, array: np.ndarray, parameters: Parameters) -> Quantized:
        """Rounds to nearest."""
        return cls(parameters.quantize(array), parameters)

    def real(self) -> np.ndarray:
        """The float32 numbers that it stands for."""
        return self.parameters.dequantize(self.array)


def quantized_nodes(graph: Graph) -> list[ir.Node]:
    """Nodes that belong to a quantized graph, in subgraphs and functions too; empty where it is float throughout."""
    return [node for node in graph.nodes() if _is_quantized(node)]


def _is_quantized(node: ir.Node) -> bool:
    if node.domain == "":
        return node.op_type in _OPERATORS
    return node.op_type in _OPERATORS | _CONTRIBUTED or node.op_type.startswith(("QLinear", "QGemm", "QAttention"))


def insert(
    graph: Graph,
    plan: Plan,
    activations: Mapping[str, Parameters],
    weights: Mapping[Weight, Quantized],
    biases: Mapping[Bias, Quantized],
) -> dict[str, int]:
    """Rewrites the graph that the plan was made on; returns how much was put in, for people.

    Args:
        activations: parameters of each of the plan's activations, equal within a group.
        weights: the plan's weights, quantized; those left out stay float.
        biases: the plan's biases, quantized; those left out stay float.
    """
    editor = Editor(graph)
    for bias, quantized in biases.items():
        editor.constant(bias.use, quantized)
    for weight, quantized in weights.items():
        editor.constant(weight.use, quantized)
    values = {value.name: value for value in _main_values(graph.model.graph)}
    for name, uses in plan.activations.items():
        editor.activation(values[name], uses, activations[name])
    return {
        "activations quantized": len(plan.activations),
        "weights quantized": len(weights),
        "biases quantized": len(biases),
    }


class Editor:
    """Edits the main graph of a model; names stay unique, and a graph output keeps its name."""

    def __init__(self, graph: Graph) -> None:
        self._main = graph.model.graph
        self._graph = graph
        self._names = Names(graph)
        self._constants: dict[tuple[ir.Value, str], ir.Value] = {}

    def activation(self, value: ir.Value, uses: Collection[Use], parameters: Parameters) -> ir.Value:
        """Lets `uses` read the value through one pair of Q and DQ; returns what they read then."""
        scale, zero_point = self._parameters(value.name or "", parameters)
        axis = {} if parameters.axis is None else {"axis": parameters.axis}
        quantize = ir.node("QuantizeLinear", [value, scale, zero_point], axis)
        quantized = self._name_output(quantize, f"{value.name}/quantized", parameters.dtype, value.shape)
        dequantize = ir.node("DequantizeLinear", [quantized, scale, zero_point], axis)
        result = self._name_output(dequantize, f"{value.name}/dequantized", ir.DataType.FLOAT, value.shape)
        if (producer := value.producer()) is not None:
            self._main.insert_after(producer, [quantize, dequantize])
        else:
            self._insert_first([quantize, dequantize])
        for node, place in uses:
            if node is None:
                self._main.outputs[place] = result
            else:
                asks_size = node.op_type in _ASKING_SIZE and node.domain == ""
                node.replace_input_with(place, quantized if asks_size else result)
        if any(node is None for node, _ in uses):
            name, result.name = value.name, None
            value.name = self._names.free(f"{name}/float")
            result.name = name
        return result

    def constant(self, use: Use, quantized: Quantized) -> ir.Value:
        """Lets a use read a quantized constant through DequantizeLinear; returns what it reads then.

        The float constant goes when nothing reads it any more.
        """
        value = use.node.inputs[use.place] if use.node is not None else None
        if use.node is None or value is None:
            raise ValueError("a constant operand belongs to a node")
        key = value, _digest(quantized)
        if key not in self._constants:
            self._constants[key] = self._dequantized(value.name or "", quantized)
        use.node.replace_input_with(use.place, self._constants[key])
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            self._main.initializers.pop(value.name or "", None)
        return self._constants[key]

    def _dequantized(self, name: str, quantized: Quantized) -> ir.Value:
        parameters = quantized.parameters
        stored = self._constant(f"{name}/quantized", quantized.array)
        axis = {} if parameters.axis is None else {"axis": parameters.axis}
        node = ir.node("DequantizeLinear", [stored, *self._parameters(name, parameters)], axis)
        self._insert_first([node])
        return self._name_output(node, f"{name}/dequantized", ir.DataType.FLOAT, stored.shape)

    def _parameters(self, name: str, parameters: Parameters) -> tuple[ir.Value, ir.Value]:
        scale = self._constant(f"{name}/scale", parameters.scale)
        return scale, self._constant(f"{name}/zero_point", parameters.zero_point)

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        return add_initializer(self._graph, self._names.free(name), array)

    def _name_output(self, node: ir.Node, name: str, dtype: ir.DataType, shape: ir.Shape | None) -> ir.Value:
        (value,) = node.outputs
        value.name, value.type, value.shape = self._names.free(name), ir.TensorType(dtype), shape
        node.name = f"{node.op_type}/{value.name}"
        return value

    def _insert_first(self, nodes: list[ir.Node]) -> None:
        if len(self._main):
            self._main.insert_before(self._main[0], nodes)
        else:
            self._main.extend(nodes)


def _main_values(graph: ir.Graph) -> list[ir.Value]:
    outputs = (output for node in graph for output in node.outputs)
    return [*graph.inputs, *graph.initializers.values(), *outputs]


def _digest(quantized: Quantized) -> str:
    hasher = hashlib.sha256(repr((quantized.array.dtype.name, quantized.parameters.axis)).encode())
    for array in (quantized.array, quantized.parameters.scale, quantized.parameters.zero_point):
        hasher.update(np.ascontiguousarray(array).view(np.uint8).data)
    return hasher.hexdigest()
