"""Batch statistics of a pruned graph: BatchNormalization expects the means and variances of the whole one.

    mean' = mean + E[x'] - E[x]        variance' = variance * Var[x'] / Var[x]        by channel, over the data

so that on the data each channel is normalized as before, whatever data the statistics were from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from ..graph import Graph
from ..graph.editing import is_constant
from ..graph.probe import Tapped
from ..graph.selection import label
from ..quantization.layers import assign_input, constant, operand

_TINY = 1e-12


def reestimate(
    whole: Graph, pruned: Graph, kept: Mapping[str, np.ndarray], samples: Iterable[Mapping[str, np.ndarray]]
) -> dict[str, int]:
    """Gives every BatchNormalization of the pruned graph new statistics, in the order of the graph.

    Args:
        kept: by the label of those whose channels were pruned: which are left.

    Returns counts by kind of change.
    """
    before = {label(node): node for node in _normalizations(whole)}
    nodes = [node for node in _normalizations(pruned) if label(node) in before]
    for node in nodes:
        (mean, variance), (new_mean, new_variance) = (
            _statistics(graph, operand(one, 0).name or "", samples)
            for graph, one in ((whole, before[label(node)]), (pruned, node))
        )
        left = kept.get(label(node), np.arange(len(mean)))
        mean, variance = mean[left], variance[left]
        assign_input(node, 3, (constant(operand(node, 3)) + new_mean - mean).astype(np.float32), pruned)
        ratio = np.maximum(new_variance, _TINY) / np.maximum(variance, _TINY)
        assign_input(node, 4, (constant(operand(node, 4)) * ratio).astype(np.float32), pruned)
    return {"batch statistics taken anew": len(nodes)} if nodes else {}


def _normalizations(graph: Graph) -> list[ir.Node]:
    """Those with constant statistics."""
    found = (node for node in graph.model.graph if node.op_type == "BatchNormalization" and not node.domain)
    return [node for node in found if is_constant(node.inputs[3]) and is_constant(node.inputs[4])]


def _statistics(graph: Graph, name: str, samples: Iterable[Mapping[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each channel."""
    tap = Tapped(graph, [name], optimized=True)
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    for sample in samples:
        x = np.moveaxis(tap(sample)[name].astype(np.float64), 1, 0)
        x = x.reshape(len(x), -1)
        count, total, squares = count + x.shape[1], total + x.sum(axis=1), squares + np.square(x).sum(axis=1)
    mean = total / max(count, 1)
    return mean, squares / max(count, 1) - np.square(mean)
