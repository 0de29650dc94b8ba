"""Batch statistics of a pruned graph: BatchNormalization expects the means and variances of the whole one.

    r = Var[x'] / Var[x]        mean' = E[x'] + (mean - E[x]) sqrt(r)        variance' = variance r

by channel, over the data, so that on the data each channel is normalized as before, whatever data the statistics were
from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from ..graph import Graph
from ..graph.probe import Tapped
from ..graph.selection import label
from ..quantization.layers import assign_input, constant, is_weight, operand

_TINY = 1e-12


def reestimate(
    whole: Graph, pruned: Graph, kept: Mapping[str, np.ndarray], samples: Iterable[Mapping[str, np.ndarray]]
) -> dict[str, int]:
    """Gives every BatchNormalization of the pruned graph new statistics, in the order of the graph.

    Args:
        kept: by the label of those whose channels were pruned: which are left.

    Returns counts by kind of change.
    """
    before = {label(node): operand(node, 0).name or "" for node in _normalizations(whole)}
    nodes = [node for node in _normalizations(pruned) if label(node) in before]
    known = _statistics(whole, before.values(), samples) if nodes else {}
    for node in nodes:
        mean, variance = known[before[label(node)]]
        name = operand(node, 0).name or ""
        new_mean, new_variance = _statistics(pruned, [name], samples)[name]
        left = kept.get(label(node), np.arange(len(mean)))
        ratio = np.maximum(new_variance, _TINY) / np.maximum(variance[left], _TINY)
        shifted = new_mean + (constant(operand(node, 3)) - mean[left]) * np.sqrt(ratio)
        assign_input(node, 3, shifted.astype(np.float32), pruned)
        assign_input(node, 4, (constant(operand(node, 4)) * ratio).astype(np.float32), pruned)
    return {"batch statistics taken anew": len(nodes)} if nodes else {}


def _normalizations(graph: Graph) -> list[ir.Node]:
    """Those with constant float32 statistics."""
    found = (node for node in graph.model.graph if node.op_type == "BatchNormalization" and not node.domain)
    return [node for node in found if is_weight(node.inputs[3]) and is_weight(node.inputs[4])]


def _statistics(
    graph: Graph, names: Iterable[str], samples: Iterable[Mapping[str, np.ndarray]]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and variance of each channel, by tensor."""
    tap = Tapped(graph, names, optimized=True)
    sums = {name: (0, np.zeros(1), np.zeros(1)) for name in tap.names}
    for sample in samples:
        found = tap(sample)
        for name, (count, total, squares) in sums.items():
            x = np.moveaxis(found[name].astype(np.float64), 1, 0)
            x = x.reshape(len(x), -1)
            sums[name] = count + x.shape[1], total + x.sum(axis=1), squares + np.square(x).sum(axis=1)
    means = {name: total / max(count, 1) for name, (count, total, _) in sums.items()}
    return {
        name: (means[name], squares / max(count, 1) - means[name] ** 2) for name, (count, _, squares) in sums.items()
    }
