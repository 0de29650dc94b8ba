"""What the passes share that quantize matrix products node by node, without Q and DQ around them."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ...passes.base import PassResult, Refusal
from ..graph import Graph
from ..graph.editing import flattened
from ..graph.selection import label
from .constants import Constants
from .qdq import quantized_nodes

SMALLEST = 1 << 15
"""Elements of a weight that gains: 256 x 64 runs at 0.95 of float's speed, 256 x 256 at 1.08, 384 x 1536 at 2.3."""
NARROWEST = (64, 16)
"""Fewest rows and columns of a weight that gains: 13 x 512 and 512 x 1 run at 0.8 of float's speed."""


_WEIGHTS = {"GRU": (1, 2, 3), "Gemm": (1,), "LSTM": (1, 2), "MatMul": (1,)}
"""Operators, with the places of their weights."""


def prepared(graph: Graph) -> Graph:
    """A copy to work on: functions inlined, types and shapes inferred, and weights that are computed folded.

    A table that an embedding shares with the last layer, there transposed, is untied by that.

    Raises:
        TargetUnavailableError: a weight has to be computed and ONNX Runtime is not installed.
    """
    work = flattened(graph)
    constants = Constants(work)
    for node in list(work.model.graph):
        for place in _WEIGHTS.get(node.op_type, ()) if not node.domain else ():
            if place < len(node.inputs):
                constants.fold(node.inputs[place])
    return work


def taken_over(graph: Graph, work: Graph, changes: Mapping[str, int], refusals: Sequence[Refusal]) -> PassResult:
    """The result of a pass whose work takes the place of the graph."""
    RemoveUnusedNodesPass()(work.model)
    details = {"weight_bytes": {"before": graph.weight_bytes, "after": work.weight_bytes}}
    graph.model = work.model
    return PassResult(modified=True, changes=dict(changes), refusals=tuple(refusals), details=details)


def exempt(node: ir.Node, graph: Graph, keep: Mapping[str, str]) -> str | None:
    """Why a node is not looked at; None where it is.

    Args:
        keep: nodes that stay by choice, as `select` gives them.
    """
    if (pattern := keep.get(label(node))) is not None:
        return f"kept by choice: {pattern!r}"
    return None if node.graph is graph.model.graph else "it is in a subgraph"


def too_small(weight: np.ndarray) -> str | None:
    """Why a weight (K, N) does not gain; None where it does."""
    rows, columns = weight.shape
    if weight.size >= SMALLEST and rows >= NARROWEST[0] and columns >= NARROWEST[1]:
        return None
    return f"its weight of {rows} x {columns} is too small to gain"


def already(graph: Graph) -> Iterator[str]:
    """A reason where a graph is quantized in part or in whole."""
    if present := collections.Counter(node.op_type for node in quantized_nodes(graph)):
        kept = ", ".join(f"{count} {operator}" for operator, count in sorted(present.items()))
        yield f"already quantized and kept: {kept}"
