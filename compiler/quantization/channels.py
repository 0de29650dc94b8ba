"""Divides a tensor's channels by factors without a node for it: in the constants that its producers hold.

    Conv / Gemm / MatMul     W, b over output channels           LayerNormalization and the like    gamma, beta
    x + constant             the constant, and what makes x      x * constant                       the constant

Relu, LeakyRelu, PRelu, pooling, reductions over other axes, and Flatten of one position pass a positive factor through.
Everything else refuses.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from ..graph import Graph
from ..graph.selection import label
from .layers import Layer, as_layer, assign_input, constant, is_shared, is_weight, operand

_HOMOGENEOUS = frozenset(
    ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity", "LeakyRelu", "MaxPool", "PRelu", "Relu")
)
_SECOND_AXIS = frozenset(("BatchNormalization", "InstanceNormalization"))
_LAST_AXIS = frozenset(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"))
"""Normalizations by their axis over channels; inputs 1 and 2 are gamma and beta."""


class UnfoldableError(Exception):
    """Why the channels cannot be divided; the message is for people."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """A constant input of a node, with its axis over the channels."""

    node: ir.Node
    index: int
    axis: int


@dataclasses.dataclass(frozen=True)
class Source:
    """What to divide so that a tensor's channels are divided. `layer` is where they come from, if it is a layer."""

    slots: tuple[Slot, ...]
    layer: Layer | None

    def divide(self, graph: Graph, factor: np.ndarray) -> None:
        """Divides channel i by factor[i], which must be positive."""
        for slot in self.slots:
            array = constant(operand(slot.node, slot.index))
            shape = [1] * array.ndim
            shape[slot.axis] = -1
            assign_input(slot.node, slot.index, (array / factor.reshape(shape)).astype(array.dtype), graph)


def source(value: ir.Value, axis: int) -> Source:
    """What makes the channels of a value, along this axis (not negative).

    The uses of `value` itself are the caller's to check; what lies before it must have no other use.

    Raises:
        UnfoldableError: with the reason.
    """
    if value.is_graph_output():
        raise UnfoldableError(f"{value.name!r} is an output of the model")
    node = value.producer()
    if node is None:
        raise UnfoldableError(f"{value.name!r} is an input of the model")
    rank = rank_of(value)
    channels = value.shape[axis] if value.shape is not None else None
    if not isinstance(channels, int):
        raise UnfoldableError(f"the channels of {value.name!r} are not known")
    if (layer := as_layer(node)) is not None:
        return _of_layer(layer, axis, rank)
    if node.domain == "" and node.op_type in _HOMOGENEOUS and value is node.outputs[0]:
        return _before(node, 0, axis)
    if node.domain == "" and node.op_type == "Flatten":
        return _of_flatten(node, axis, channels)
    if node.domain == "" and node.op_type in ("ReduceMax", "ReduceMean", "ReduceSum"):
        return _before(node, 0, _axis_before(node, axis))
    if node.op_type in _SECOND_AXIS | _LAST_AXIS and value is node.outputs[0]:
        return _of_normalization(node, axis, rank, channels)
    if node.domain == "" and node.op_type in ("Add", "Mul", "Sub"):
        return _of_arithmetic(node, axis, rank, channels)
    raise UnfoldableError(f"{node.op_type} {label(node)!r} does not pass a factor for each channel through")


def rank_of(value: ir.Value) -> int:
    """How many axes a value has.

    Raises:
        UnfoldableError: that is not known.
    """
    if value.shape is None:
        raise UnfoldableError(f"the rank of {value.name!r} is not known")
    return len(value.shape)


def _before(node: ir.Node, index: int, axis: int) -> Source:
    value = operand(node, index)
    if is_shared(value):
        raise UnfoldableError(f"{value.name!r} has other uses")
    return source(value, axis)


def _of_layer(layer: Layer, axis: int, rank: int) -> Source:
    if axis != layer.channel_axis(rank):
        raise UnfoldableError(f"the channels that {layer.name!r} gives lie along another axis")
    if is_shared(layer.weight):
        raise UnfoldableError(f"the weights of {layer.name!r} are shared")
    slots = [Slot(layer.node, 1, layer.output_axis)]
    if len(layer.node.inputs) > 2 and layer.node.inputs[2] is not None:
        slots.append(_vector(layer.node, 2, -1, layer.load().shape[0]))
    return Source(tuple(slots), layer)


def _of_flatten(node: ir.Node, axis: int, channels: int) -> Source:
    value = operand(node, 0)
    kept = rank_of(value) > 1 and value.shape is not None and value.shape[1] == channels
    if axis != 1 or node.attributes.get_int("axis", 1) != 1 or not kept:
        raise UnfoldableError(f"Flatten {label(node)!r} mixes channels with positions")
    return _before(node, 0, 1)


def _of_normalization(node: ir.Node, axis: int, rank: int, channels: int) -> Source:
    last = node.op_type in _LAST_AXIS
    fits = node.attributes.get_int("axis", -1) % rank == axis == rank - 1 if last else axis == 1
    if not fits:
        raise UnfoldableError(f"{node.op_type} {label(node)!r} normalizes over other axes")
    if node.attributes.get_int("training_mode", 0):
        raise UnfoldableError(f"{label(node)!r} is in training mode")
    given = [index for index in (1, 2) if index < len(node.inputs) and node.inputs[index] is not None]
    return Source(tuple(_vector(node, index, -1, channels) for index in given), None)


def _of_arithmetic(node: ir.Node, axis: int, rank: int, channels: int) -> Source:
    constants = [index for index in (0, 1) if is_weight(node.inputs[index])]
    if len(constants) != 1:
        raise UnfoldableError(f"{node.op_type} {label(node)!r} joins two branches")
    slot = _vector(node, constants[0], axis - rank, channels)
    if node.op_type == "Mul":
        return Source((slot,), None)
    before = _before(node, 1 - constants[0], axis)
    return Source((slot, *before.slots), before.layer)


def _vector(node: ir.Node, index: int, axis: int, channels: int) -> Slot:
    """The slot of a constant with one number a channel; `axis` counts from the end."""
    value = operand(node, index)
    shape = constant(value).shape if is_weight(value) else ()
    if -axis > len(shape) or shape[axis] != channels or np.prod(shape) != channels:
        raise UnfoldableError(f"input {value.name!r} of {label(node)!r} is not one constant a channel")
    return Slot(node, index, len(shape) + axis)


def _axis_before(node: ir.Node, axis: int) -> int:
    """Where an axis of a reduction's output was in its input."""
    value = operand(node, 0)
    given = node.attributes.get("axes")
    if given is not None:
        reduced = list(given.as_ints())
    elif len(node.inputs) > 1 and node.inputs[1] is not None and node.inputs[1].const_value is not None:
        reduced = [int(a) for a in node.inputs[1].const_value.numpy().reshape(-1)]
    else:
        reduced = []
    if not reduced:
        raise UnfoldableError(f"{node.op_type} {label(node)!r} reduces axes that are not known")
    rank = rank_of(value)
    left = [i for i in range(rank) if i not in {a % rank for a in reduced}]
    before = axis if node.attributes.get_int("keepdims", 1) else left[axis]
    if before not in left:
        raise UnfoldableError(f"{node.op_type} {label(node)!r} reduces the channels")
    return before
