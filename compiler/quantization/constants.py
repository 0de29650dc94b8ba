"""Tensors that depend on no input: initializers, and what chains of nodes make of them (Transpose, Slice, Concat)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..graph import Graph
from ..graph.editing import Names, add_initializer
from ..graph.probe import Session

_NOT_FOLDED = frozenset(
    ("Bernoulli", "DequantizeLinear", "Dropout", "Multinomial", "QuantizeLinear", "RandomNormal")
) | {"RandomNormalLike", "RandomUniform", "RandomUniformLike"}
"""Random operators, and those of a weight that is quantized already."""


class Constants:
    """Looks constants of a graph's main graph up; each chain is computed once."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._constant: dict[ir.Value, bool] = {}
        self._arrays: dict[ir.Value, np.ndarray] = {}

    def array(self, value: ir.Value | None) -> np.ndarray | None:
        """The array that a value always holds; None where it depends on an input or is not to be folded.

        Raises:
            TargetUnavailableError: a chain has to be computed and ONNX Runtime is not installed.
        """
        if value is None or not self._is_constant(value):
            return None
        if value not in self._arrays:
            self._arrays[value] = self._compute(value)
        return self._arrays[value]

    def fold(self, value: ir.Value | None) -> bool:
        """Makes an initializer of a value that nodes compute from constants, under its name where nothing else has it.

        Returns whether it did. The nodes before the last one may be left without a use.

        Raises:
            TargetUnavailableError: as `array`.
        """
        node = value.producer() if value is not None else None
        if value is None or node is None or (array := self.array(value)) is None:
            return False
        graph = self._graph.model.graph
        whole = len(node.outputs) == 1 and not value.is_graph_output()
        name = value.name or ""
        if whole:
            value.name = None
        else:
            name = Names(self._graph).free(f"{name}/folded")
        folded = add_initializer(self._graph, name, array)
        for user, place in tuple(value.uses()):
            user.replace_input_with(place, folded)
        if whole:
            graph.remove(node, safe=True)
        return True

    def _is_constant(self, value: ir.Value) -> bool:
        waiting = [value]
        while waiting:
            current = waiting[-1]
            if current in self._constant:
                waiting.pop()
                continue
            node = current.producer()
            if node is None or node.graph is not self._graph.model.graph or not _foldable(node):
                self._constant[current] = current.is_initializer() and not current.is_graph_input()
                continue
            inputs = [used for used in node.inputs if used is not None]
            unknown = [used for used in inputs if used not in self._constant]
            if not unknown:
                self._constant[current] = all(self._constant[used] for used in inputs)
            waiting.extend(unknown)
        return self._constant[value]

    def _compute(self, value: ir.Value) -> np.ndarray:
        if value.const_value is not None:
            return value.const_value.numpy()
        model = self._graph.model
        part = ir.convenience.extract(model.graph, [], [value])
        session = Session(Graph(ir.Model(part, ir_version=model.ir_version)))
        return session({})[0]


def _foldable(node: ir.Node) -> bool:
    subgraphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    if node.domain or node.op_type in _NOT_FOLDED:
        return False
    return not any(attribute.type in subgraphs for attribute in node.attributes.values())
