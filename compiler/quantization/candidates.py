"""What the passes share that quantize matrix products node by node, without Q and DQ around them."""

from __future__ import annotations

import collections
import fnmatch
from collections.abc import Collection, Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from ..graph import Graph
from .qdq import quantized_nodes

SMALLEST = 1 << 15
"""Elements of a weight that gains: 256 x 64 runs at 0.95 of float's speed, 256 x 256 at 1.08, 384 x 1536 at 2.3."""
NARROWEST = (64, 16)
"""Fewest rows and columns of a weight that gains: 13 x 512 and 512 x 1 run at 0.8 of float's speed."""


def prepared(graph: Graph) -> Graph:
    """A copy to work on: functions inlined, types and shapes inferred."""
    work = graph.clone()
    if work.model.functions:
        InlinePass()(work.model)
        work.model.functions.clear()
    work.infer()
    return work


def exempt(node: ir.Node, graph: Graph, keep: Collection[str]) -> str | None:
    """Why a node is not looked at; None where it is.

    Args:
        keep: globs of node names.
    """
    if any(fnmatch.fnmatchcase(node.name or "", pattern) for pattern in keep):
        return "kept by choice"
    return None if node.graph is graph.model.graph else "it is in a subgraph"


def too_small(weight: np.ndarray) -> str | None:
    """Why a weight (K, N) does not gain; None where it does."""
    rows, columns = weight.shape
    if weight.size >= SMALLEST and rows >= NARROWEST[0] and columns >= NARROWEST[1]:
        return None
    return f"its weight of {rows} x {columns} is too small to gain"


def unmatched(graph: Graph, keep: Collection[str]) -> Iterator[str]:
    """A reason for each glob that no node's name matches."""
    names = [node.name or "" for node in graph.nodes()]
    for pattern in keep:
        if not fnmatch.filter(names, pattern):
            yield f"keep: no node is named {pattern!r}"


def already(graph: Graph) -> Iterator[str]:
    """A reason where a graph is quantized in part or in whole."""
    if present := collections.Counter(node.op_type for node in quantized_nodes(graph)):
        kept = ", ".join(f"{count} {operator}" for operator, count in sorted(present.items()))
        yield f"already quantized and kept: {kept}"
