"""Rewrites beside the growing of dimensions, each for those who measured that it helps.

MatMul (B, S, K) x (K, N)     ->    Reshape (B * S, K), Gemm, Reshape (B, S, N)
Conv of 3 input channels      ->    Pad to 4 or 8 at run time, Conv of as many
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...passes.base import Refusal
from ..graph import Graph
from ..graph.editing import Names, add_initializer, is_constant
from ..graph.selection import label

_PAD_OPSET = 11
"""Opset in which the pads became an input."""


def flatten_products(graph: Graph) -> tuple[int, list[Refusal]]:
    """Makes products with a constant matrix two-dimensional, the bias within. Returns how many, and which stay."""
    names, refusals, count = Names(graph), [], 0
    for node in list(graph.model.graph):
        x, weight = (*node.inputs, None)[:2] if node.op_type == "MatMul" else (None, None)
        if node.domain or x is None or x.shape is None or len(x.shape) < 3 or not is_constant(weight):
            continue
        assert weight is not None
        if weight.shape is None or len(weight.shape) != 2:
            continue
        k, n = weight.shape.numpy()
        rows = [axis if isinstance(axis, int) else -1 for axis in list(x.shape)[:-1]]
        if rows.count(-1) > 1:
            refusals.append(Refusal(f"not flattened: more than one dynamic axis in {x.name}", label(node)))
            continue
        _flatten(graph, node, ([-1, k], [*rows, n]), names)
        count += 1
    return count, refusals


def _flatten(graph: Graph, node: ir.Node, shapes: Sequence[Sequence[int]], names: Names) -> None:
    last, inputs = node, [*node.inputs]
    if (bias := _bias(node)) is not None:
        last, added = bias
        inputs.append(added)
    before, after = (
        add_initializer(graph, names.free(f"{label(node)}/shape"), np.array(shape, dtype=np.int64)) for shape in shapes
    )
    flat = ir.node("Reshape", [inputs[0], before], name=f"{label(node)}/rows")
    product = ir.node("Gemm" if last is not node else "MatMul", [flat.outputs[0], *inputs[1:]], name=label(node))
    whole = ir.node("Reshape", [product.outputs[0], after], name=f"{label(node)}/whole")
    for made, what in ((flat.outputs[0], "rows"), (product.outputs[0], "product")):
        made.name, made.type = names.free(f"{label(node)}/{what}"), node.outputs[0].type
    ir.convenience.replace_nodes_and_values(
        graph.model.graph, last, [node, last] if last is not node else [node], [flat, product, whole],
        [last.outputs[0]], [whole.outputs[0]],
    )  # fmt: skip


def _bias(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The Add of a constant vector behind a product that nothing else reads, and the vector."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output():
        return None
    user, index = uses[0]
    other = user.inputs[1 - index] if user.op_type == "Add" and not user.domain else None
    if other is None or not is_constant(other) or other.shape is None or len(other.shape) != 1:
        return None
    return user, other


def pad_stems(graph: Graph, channels: int) -> tuple[int, list[Refusal]]:
    """Pads the input of the model to more channels, where a Conv reads it. Returns how many, and which stay."""
    names, refusals, count = Names(graph), [], 0
    for node in list(graph.model.graph):
        x = node.inputs[0] if node.op_type == "Conv" and not node.domain else None
        old = node.inputs[1] if x is not None and x.is_graph_input() else None
        if x is None or old is None or old.const_value is None or node.attributes.get_int("group", 1) != 1:
            continue
        weight = old.const_value.numpy()
        if weight.shape[1] >= channels:
            continue
        if graph.opset < _PAD_OPSET:
            refusals.append(Refusal(f"not padded: opset {graph.opset} has no Pad with inputs", label(node)))
            continue
        new = channels - weight.shape[1]
        pads = [0] * (2 * weight.ndim)
        pads[weight.ndim + 1] = new
        given = add_initializer(graph, names.free(f"{label(node)}/pads"), np.array(pads, dtype=np.int64))
        wide = np.pad(weight, [(0, new) if axis == 1 else (0, 0) for axis in range(weight.ndim)])
        padded = ir.node("Pad", [x, given], name=f"{label(node)}/Pad")
        padded.outputs[0].name, padded.outputs[0].type = names.free(f"{x.name}/padded"), x.type
        graph.model.graph.insert_before(node, padded)
        node.replace_input_with(0, padded.outputs[0])
        node.replace_input_with(1, add_initializer(graph, names.free(f"{old.name}/padded"), wide, old.dtype))
        count += 1
    return count, refusals
