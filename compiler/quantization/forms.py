"""Gives nodes the form that ONNX Runtime on the CPU has an integer kernel for; what they compute stays the same.

The first of them is for TensorRT as well.

    ReduceMean over all positions       ->  GlobalAveragePool                  (Flatten where the axes go)
    BatchNormalization before Conv      ->  Conv 1x1 of one channel each       where no Conv before it takes it in
    Conv of stride 2 over few channels  ->  stride 1 over four times as many   see `stem`
    MatMul of matrices, + bias          ->  Gemm                               whose kernel takes an int32 bias
    MatMul of more dimensions, + b[N]   ->  the same, + b[1, N]

The last keeps ONNX Runtime from turning MatMul and Add into Reshape, Gemm, Reshape (MatMulAddFusion) before it looks
for quantized nodes: it would find none there, and would compute the weights from int8 anew on each call.
"""

from __future__ import annotations

import collections
from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from ..graph import Graph
from ..graph.editing import is_constant
from ..graph.selection import label
from .constants import Constants
from .layers import free_name, initializer
from .stem import widen_stem

_WEIGHTED = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
_INTEGER = frozenset(("Add", "AveragePool", "Concat", "Conv", "MaxPool", "Mul", "Relu"))


def prepare(graph: Graph, keep: Collection[str] = ()) -> dict[str, int]:
    """Rewrites the main graph in place; shapes must be inferred, constants be initializers. Returns counts.

    Args:
        keep: labels of nodes that are to stay float, and stay as they are.
    """
    changes = collections.Counter(pool_means(graph, keep))
    for node in list(graph.model.graph):
        if not _is_free(node, keep):
            continue
        if node.op_type == "BatchNormalization" and _is_between(node):
            _to_conv(graph, node)
            changes["BatchNormalization to Conv"] += 1
        elif node.op_type == "Conv" and widen_stem(graph, node):
            changes["Conv of stride 2 to stride 1"] += 1
        elif node.op_type == "MatMul" and _has_matrix(node):
            if _rank(node.inputs[0]) == 2:
                _to_gemm(graph, node)
                changes["MatMul to Gemm"] += 1
            elif (add := _bias_add(node)) is not None:
                _widen_bias(graph, node, add)
                changes["biases given two dimensions"] += 1
    return dict(changes)


def pool_means(graph: Graph, keep: Collection[str] = ()) -> dict[str, int]:
    """The first of the rewrites alone."""
    found = [node for node in graph.model.graph if node.op_type == "ReduceMean" and _is_free(node, keep)]
    means = [node for node in found if _is_over_positions(node)]
    for node in means:
        _pool(graph, node)
    return {"ReduceMean to GlobalAveragePool": len(means)} if means else {}


def fold_weights(graph: Graph) -> int:
    """Makes initializers of weights and biases that nodes compute from constants alone; returns how many."""
    constants = Constants(graph)
    weighted = [node for node in graph.model.graph if node.op_type in _WEIGHTED and not node.domain]
    return sum(constants.fold(value) for node in weighted for value in node.inputs[1:])


def _is_free(node: ir.Node, keep: Collection[str]) -> bool:
    result = node.outputs[0] if node.outputs else None
    return not node.domain and result is not None and result.dtype == ir.DataType.FLOAT and label(node) not in keep


def _is_over_positions(node: ir.Node) -> bool:
    """Whether it takes the mean over every axis behind batch and channels."""
    rank = _rank(node.inputs[0])
    axes: list[int] = []
    if (
        len(node.inputs) > 1
        and is_constant(value := node.inputs[1])
        and value is not None
        and value.const_value is not None
    ):
        axes = value.const_value.numpy().reshape(-1).tolist()
    elif "axes" in node.attributes:
        axes = list(node.attributes["axes"].as_ints())
    return rank is not None and rank > 2 and sorted(axis % rank for axis in axes) == list(range(2, rank))


def _pool(graph: Graph, node: ir.Node) -> None:
    (result,) = node.outputs
    keeps = node.attributes.get_int("keepdims", 1) == 1
    pool = ir.node("GlobalAveragePool", [node.inputs[0]], name=f"{node.name or result.name}/pool")
    new = [pool]
    if not keeps:
        pooled = pool.outputs[0]
        pooled.name, pooled.type = free_name(graph, f"{result.name}/pooled"), result.type
        source = node.inputs[0]
        if source is not None and source.shape is not None:
            pooled.shape = ir.Shape([*source.shape[:2], *(1 for _ in source.shape[2:])])
        new.append(ir.node("Flatten", [pooled], name=f"{node.name or result.name}/flatten"))
    _replace(graph, node, new)


def _is_between(node: ir.Node) -> bool:
    """Whether a Conv, perhaps behind a Relu, reads the result, and an operator of integers gives the input."""
    x, result = node.inputs[0], node.outputs[0]
    producer = x.producer() if x is not None else None
    if producer is None or producer.op_type not in _INTEGER or len(node.outputs) > 1 or (_rank(x) or 0) < 3:
        return False
    readers = [user for user, _ in result.uses()]
    readers += [user for relu in readers if relu.op_type == "Relu" for user, _ in relu.outputs[0].uses()]
    trains = node.attributes.get_int("training_mode", 0) == 1
    return not trains and all(map(is_constant, node.inputs[1:])) and any(user.op_type == "Conv" for user in readers)


def _to_conv(graph: Graph, node: ir.Node) -> None:
    """By scale and shift: (x - mean) / sqrt(variance + epsilon) * scale + shift."""
    x = node.inputs[0]
    scale, shift, mean, variance = (v.const_value.numpy() for v in node.inputs[1:] if v is not None and v.const_value)
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    factor = scale / np.sqrt(variance.astype(np.float64) + epsilon)
    weight = initializer(graph, f"{label(node)}/weight", factor.reshape(-1, *[1] * ((_rank(x) or 0) - 1)))
    bias = initializer(graph, f"{label(node)}/bias", shift - mean * factor)
    _replace(graph, node, [ir.node("Conv", [x, weight, bias], {"group": len(factor)}, name=node.name)])


def _has_matrix(node: ir.Node) -> bool:
    weight = node.inputs[1]
    return is_constant(weight) and _rank(weight) == 2 and not is_constant(node.inputs[0])


def _to_gemm(graph: Graph, node: ir.Node) -> None:
    """The bias goes along where the product is read by its Add alone."""
    add = _bias_add(node)
    if add is None:
        _replace(graph, node, [ir.node("Gemm", list(node.inputs), name=node.name)])
        return
    (bias,) = (value for value in add.inputs if value is not node.outputs[0])
    _replace(graph, add, [ir.node("Gemm", [*node.inputs, bias], name=node.name)])
    graph.model.graph.remove(node, safe=True)


def _bias_add(node: ir.Node) -> ir.Node | None:
    """The Add of a constant (N,) that alone reads a product."""
    product, weight = node.outputs[0], node.inputs[1]
    readers = list(product.uses())
    if len(readers) != 1 or product.is_graph_output() or readers[0].node.op_identifier() != ("", "Add", ""):
        return None
    add = readers[0].node
    bias = add.inputs[1 - readers[0].idx]
    if weight is None or weight.shape is None or bias is None or bias.shape is None or not is_constant(bias):
        return None
    return add if tuple(bias.shape) == (weight.shape[1],) else None


def _widen_bias(graph: Graph, node: ir.Node, add: ir.Node) -> None:
    place = 1 if add.inputs[0] is node.outputs[0] else 0
    bias = add.inputs[place]
    if bias is None or bias.const_value is None:
        raise ValueError("a bias is a constant")
    array: np.ndarray = bias.const_value.numpy()
    add.replace_input_with(place, initializer(graph, f"{bias.name}/row", array.reshape(1, -1)))
    if not bias.uses() and not bias.is_graph_output():
        graph.model.graph.initializers.pop(bias.name or "")


def _replace(graph: Graph, node: ir.Node, new: list[ir.Node]) -> None:
    """Puts nodes in the place of one; the last gives its result, under its name."""
    (old,) = node.outputs
    result = new[-1].outputs[0]
    result.type, result.shape = old.type, old.shape
    graph.model.graph.insert_before(node, new)
    name = old.name
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.model.graph.remove(node, safe=True)
    result.name = name


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)
