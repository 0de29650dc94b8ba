"""Marks nodes that stay in float32, for builders that choose precisions by themselves: TensorRT 8.6 and 9.

Every later lowering heeds the marks as well, see `compiler.graph.precision.keep`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ..compiler.graph import Graph
from ..compiler.graph.precision import keep, kept
from ..compiler.graph.selection import label, select
from .base import Context, Pass, PassResult


@dataclasses.dataclass(frozen=True)
class Pin(Pass):
    """Marks nodes; operators and types stay.

    Attributes:
        keep: names or globs of the nodes.
    """

    name: ClassVar[str] = "pin"
    keep: tuple[str, ...] = ()

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Marks in place.

        Raises:
            RecipeError: `keep` has a pattern that matches no node.
        """
        asked = select(graph, self.keep)
        chosen = [node for node in graph.nodes() if label(node) in asked and kept(node) is None]
        for node in chosen:
            keep(node, f"kept by choice: {asked[label(node)]!r}")
        return PassResult(modified=bool(chosen), changes={"nodes pinned": len(chosen)} if chosen else {})
