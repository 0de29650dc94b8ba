"""Replaces one node by several, or puts them beside it; its values keep their names, and every new name is its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from ..graph import Graph
from ..graph.editing import Names, add_initializer
from ..graph.schemas import MICROSOFT
from ..graph.selection import label

Attributes: TypeAlias = Mapping[str, int | float | str | Sequence[float] | Sequence[str] | ir.Graph]


class Patcher:
    """Makes patches of a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._names = Names(graph)
        self._nodes = {node.name for node in graph.nodes()}

    def initializer(self, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
        """Adds a constant to the main graph; `dtype` where NumPy has none of its own, such as INT4."""
        return add_initializer(self.graph, self.name(name), array, dtype)

    def name(self, wanted: str) -> str:
        """A name that no tensor has yet."""
        return self._names.free(wanted)

    def node_name(self, wanted: str) -> str:
        """A name that no node has yet."""
        return _unused(wanted, self._nodes)


class Patch:
    """The nodes that take the place of one."""

    def __init__(self, patcher: Patcher, node: ir.Node) -> None:
        self._patcher = patcher
        self._old = node
        self._new: list[ir.Node] = []
        self.title = label(node)

    def add(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[tuple[str, ir.DataType, ir.Shape | None]],
        attributes: Attributes | None = None,
        *,
        domain: str = "",
        main: bool = False,
    ) -> tuple[ir.Value, ...]:
        """Adds a node and gives its outputs; the `main` one of the patch gets the name of the node replaced."""
        name = self._old.name if main else self._patcher.node_name(f"{self.title}/{operator}")
        values = [
            ir.Value(name=self._patcher.name(wanted), type=ir.TensorType(dtype), shape=shape)
            for wanted, dtype, shape in outputs
        ]
        self._new.append(ir.node(operator, inputs, attributes, domain=domain, outputs=values, name=name))
        if domain == MICROSOFT:
            self._patcher.graph.model.opset_imports.setdefault(MICROSOFT, 1)
        return tuple(values)

    def apply(self, *results: ir.Value, also: Sequence[ir.Node] = ()) -> None:
        """Puts the new nodes in; `results` take over the outputs of the old node that have a name, and their names.

        Args:
            also: further nodes that go, whose outputs come behind those of the old one.
        """
        graph = self._patcher.graph.model.graph
        old = [self._old, *also]
        outputs = [value for node in old for value in node.outputs if value.name]
        ir.convenience.replace_nodes_and_values(graph, self._old, old, self._new, outputs, results)

    def before(self) -> None:
        """Puts the new nodes in before the old one, which stays."""
        self._patcher.graph.model.graph.insert_before(self._old, self._new)

    def beside(self) -> None:
        """Puts the new nodes in behind the old one, which stays."""
        self._patcher.graph.model.graph.insert_after(self._old, self._new)


def _unused(wanted: str, taken: set[str | None]) -> str:
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}.{number}"
    taken.add(name)
    return name
