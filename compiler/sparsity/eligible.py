"""The layers that a target can run sparse, and why the others cannot.

TensorRT has sparse kernels for convolutions without groups and for products with a constant matrix. Tensor Cores take
16 inputs and 8 outputs at a time there; NVIDIA's own tool (Apex, ASP) leaves other sizes dense too. Below some 256
channels the kernels exist and are rarely faster, which is for a measurement to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...passes.base import Refusal
from ..graph import Graph
from ..graph.selection import label
from ..quantization.candidates import exempt
from ..quantization.constants import Constants
from ..quantization.layers import Layer
from ..quantization.linear import quantized
from .pattern import GROUP, is_sparse

OPERATORS = frozenset(("Conv", "Gemm", "MatMul"))


class Size(NamedTuple):
    """Of a layer: its outputs, the inputs that each of them sums over at one place of the kernel, and its groups."""

    outputs: int
    inputs: int
    groups: int


RULES: tuple[tuple[Callable[[Size], bool], str], ...] = (
    (lambda size: size.groups > 1 and size.inputs == 1, "it is depthwise: one input channel makes no group of four"),
    (lambda size: size.groups > 1, "it has {0.groups} groups, and TensorRT has no sparse kernels for those"),
    (lambda size: size.inputs % GROUP > 0, "its {0.inputs} inputs are no multiple of 4"),
    (lambda size: size.inputs % 16 > 0, "its {0.inputs} inputs are no multiple of 16, as sparse Tensor Cores need"),
    (lambda size: size.outputs % 8 > 0, "its {0.outputs} outputs are no multiple of 8, as sparse Tensor Cores need"),
)
"""What a layer must not be, each with the reason."""


def eligible(graph: Graph, keep: Mapping[str, str]) -> tuple[list[Layer], list[Refusal]]:
    """The layers to make sparse, their weights folded into initializers; and the others, each with its reason.

    Args:
        graph: flat, see `flattened`; computed weights are folded in place.
        keep: nodes that stay dense by choice, as `select` gives them.

    Raises:
        TargetUnavailableError: a weight has to be computed and ONNX Runtime is not installed.
    """
    constants = Constants(graph)
    layers: list[Layer] = []
    refusals = []
    for node in list(graph.nodes()):
        if node.domain or node.op_type not in OPERATORS:
            continue
        if reason := exempt(node, graph, keep) or _why_dense(node, constants):
            refusals.append(Refusal(reason, label(node)))
        else:
            layers.append(Layer(node))
    # What shares a weight with a node that stays dense has to stay dense with it.
    dense = {refusal.node for refusal in refusals}
    for layer in list(layers):
        if others := [label(node) for node, _ in _readers(_root(layer.weight)) if label(node) in dense]:
            layers.remove(layer)
            refusals.append(Refusal(f"its weight is that of {others[0]!r} too, which stays dense", layer.name))
    for layer in layers:
        constants.fold(layer.weight)
    return layers, refusals


def _why_dense(node: ir.Node, constants: Constants) -> str | None:
    """Why one layer is left as it is; None where it can be sparse."""
    value = node.inputs[1]
    assert value is not None
    if quantized(value):
        return "its weight is quantized: sparsify before quantizing"
    weight = constants.array(value)
    if weight is None and constants.array(node.inputs[0]) is not None:
        return "its weight is the first operand, which kernels take dense"
    if weight is None:
        return "its weight is not constant"
    if weight.dtype != np.float32:
        return f"its weight is {weight.dtype}: float32 is made sparse, before casts"
    if node.op_type != "Conv" and weight.ndim != 2:
        return f"its weight has {weight.ndim} dimensions, kernels take 2"
    if not np.isfinite(weight).all():
        return f"its weight {value.name!r} holds NaN or Inf"
    attributes = node.attributes
    if attributes.get_int("transA", 0) or any(attributes.get_float(name, 1.0) != 1 for name in ("alpha", "beta")):
        return "it transposes its input or scales what it adds (transA, alpha, beta)"
    return _shared(value) or _broken_rule(Layer(node), weight)


def _broken_rule(layer: Layer, weight: np.ndarray) -> str | None:
    viewed = layer.viewed(weight)
    size = Size(viewed.shape[0], viewed.shape[1], layer.groups)
    for breaks, reason in RULES:
        if breaks(size):
            return reason.format(size)
    return "already 2:4 sparse, and kept" if is_sparse(viewed) else None


def _shared(weight: ir.Value) -> str | None:
    """Why a weight cannot change, for what else reads it."""
    root = _root(weight)
    if root.is_graph_output() or weight.is_graph_output():
        return "its weight is an output of the graph"
    readers = list(_readers(root))
    for reader, axis in readers:
        if axis is None and reader.op_type == "Gather":
            return "its weight is the table of an embedding too"
        if axis is None:
            return f"its weight is read by {label(reader)!r} too, which would change with it"
    if len({axis for _, axis in readers}) > 1:
        return "its weight is shared in two layouts, whose groups of four differ"
    return None


def _root(value: ir.Value) -> ir.Value:
    """What is stored, before it is transposed."""
    node = value.producer()
    while node is not None and node.op_type in ("Identity", "Transpose") and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _readers(value: ir.Value, axes: tuple[int, ...] | None = None) -> Iterator[tuple[ir.Node, int | None]]:
    """What reads a stored weight, and the axis of the stored array that it sums over; None where it is no layer.

    Args:
        axes: the stored array's axis for each of this value's.
    """
    axes = tuple(range(len(value.shape or ()))) if axes is None else axes
    for node, place in value.uses():
        if node.op_type == "Identity":
            yield from _readers(node.outputs[0], axes)
        elif node.op_type == "Transpose":
            order = node.attributes.get_ints("perm", tuple(reversed(range(len(axes)))))
            yield from _readers(node.outputs[0], tuple(axes[axis] for axis in order))
        elif node.op_type in OPERATORS and place == 1 and len(axes) > 1:
            yield node, axes[0 if Layer(node).transposed else 1]
        else:
            yield node, None
