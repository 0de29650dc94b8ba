"""How much of a model's work is done at sizes that Tensor Cores take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from ..graph import Graph
from ..graph.cost import costs
from ..graph.selection import label

RECURRENT = ("GRU", "LSTM", "RNN")
PRODUCTS = ("Attention", "Conv", "ConvInteger", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger", *RECURRENT)
"""Operators whose dimensions are looked at: what is summed over (K) and what is made (N), not the rows (M)."""


def aligned_share(graph: Graph, multiple: int, sizes: Mapping[str, int] | None = None) -> float:
    """The share of the multiply-adds that are in products whose K and N are multiples; 1 where nothing multiplies.

    Dynamic axes are left out of the question: those that are K or N, as in attention, are the caller's choice.

    Args:
        graph: with shapes inferred.
        sizes: of the dynamic axes by name, for the multiply-adds; 1 where left out.
    """
    axes = [axis for value in graph.model.graph.inputs for axis in value.shape or () if not isinstance(axis, int)]
    found = costs(graph, {**{str(axis.value): 1 for axis in axes if axis.value is not None}, **(sizes or {})})
    aligned = {label(node) for node in graph.nodes() if is_aligned(node, multiple)}
    total = sum(cost.macs for cost in found.values())
    return sum(found[name].macs for name in aligned) / total if total else 1.0


def is_aligned(node: ir.Node, multiple: int) -> bool:
    """Whether a node is a product with all of K and N known to be multiples, but for dynamic axes."""
    if node.op_type not in PRODUCTS or node.domain:
        return False
    lengths = list(_lengths(node))
    return bool(lengths) and all(length % multiple == 0 for length in lengths)


def _lengths(node: ir.Node) -> Iterator[int]:
    """K and N, as far as they are fixed."""
    if node.op_type in RECURRENT:
        yield from _axes(node, (1, 2))
        yield node.attributes.get_int("hidden_size", 0)
    elif node.op_type.startswith("Conv"):
        yield from _axes(node, (1, 1))
        yield from (length // node.attributes.get_int("group", 1) for length in _axes(node, (1, 0)))
    elif node.op_type == "Gemm":
        yield from _axes(node, (1, 0), (1, 1))
    elif node.op_type.startswith("MatMul"):
        yield from _axes(node, (0, -1), (1, -1))
    else:  # Attention of three axes has heads beside one another
        for index, heads in ((0, "q_num_heads"), (2, "kv_num_heads")):
            yield from (length // node.attributes.get_int(heads, 1) for length in _axes(node, (index, -1)))


def _axes(node: ir.Node, *places: tuple[int, int]) -> Iterator[int]:
    """Lengths of axes of inputs, those that are fixed."""
    for index, axis in places:
        value = node.inputs[index]
        if value is not None and value.shape is not None and -len(value.shape) <= axis < len(value.shape):
            length = value.shape[axis]
            if isinstance(length, int):
                yield length
