"""What rewrites of a graph share: a flat copy to work on, free names, new constants."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

from .graph import Graph


class Names:
    """Names of the values of a graph and its subgraphs; what is given out is taken from then on."""

    def __init__(self, graph: Graph) -> None:
        self._taken: set[str | None] = set()
        for scope in graph.graphs():
            self._taken.update(value.name for value in (*scope.inputs, *scope.initializers.values()))
            self._taken.update(value.name for node in scope for value in node.outputs)

    def free(self, wanted: str) -> str:
        """The name wanted, with a number where a value has that name already."""
        name, number = wanted, 1
        while name in self._taken:
            number += 1
            name = f"{wanted}.{number}"
        self._taken.add(name)
        return name


def inline(graph: Graph) -> None:
    """Puts the bodies of functions where they are called."""
    if graph.model.functions:
        InlinePass()(graph.model)
        graph.model.functions.clear()


def flattened(graph: Graph) -> Graph:
    """A copy without functions, its constants in initializers, types and shapes inferred."""
    work = graph.clone()
    inline(work)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(work.model)
    work.infer()
    return work


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer of the main graph that no caller can replace."""
    return value is not None and value.is_initializer() and not value.is_graph_input() and value.const_value is not None


def add_initializer(graph: Graph, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    """A new constant of the main graph.

    Args:
        name: one that is free.
        dtype: where NumPy has none of its own, such as INT4.
    """
    tensor = ir.Tensor(array, dtype=dtype or ir.DataType.from_numpy(array.dtype), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.model.graph.register_initializer(value)
    return value
