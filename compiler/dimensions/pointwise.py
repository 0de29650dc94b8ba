"""What elementwise operators, normalizations, reductions and pooling say of axes."""

from __future__ import annotations

import onnx_ir as ir

from ..graph.editing import is_constant
from .computed import tell_shape
from .layout import Blocks, Dim, Product
from .relations import Relations, axis_of, hold_offset, present

UNARY = frozenset((
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BiasGelu", "BitwiseNot", "Cast", "Ceil",
    "Celu", "Clip", "Cos", "Cosh", "Dropout", "DynamicQuantizeLinear", "Elu", "Erf", "Exp", "FastGelu", "Floor", "Gelu",
    "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "QuickGelu",
    "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt",
    "Swish", "Tan", "Tanh", "ThresholdedRelu",
))  # fmt: skip
BROADCAST = frozenset((
    "Add", "And", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual", "Less",
    "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
))  # fmt: skip
NORMALIZATIONS = frozenset((
    "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
))  # fmt: skip
_ADDS_UP = frozenset(("ReduceL1", "ReduceL2", "ReduceSum", "ReduceSumSquare"))
"""Reductions that more zeros leave as they are."""


def unary(node: ir.Node, relations: Relations) -> None:
    """The first input's axes are the output's; vectors beside it lie along the last one."""
    x, y = relations.input(node, 0), relations.output(node)
    relations.tie_all(node, x, y)
    for index in range(1, len(node.inputs)):
        for term in relations.input(node, index) or ():
            if term is not None:
                relations.tie(node, term, axis_of(y or [], -1))


def broadcast(node: ir.Node, relations: Relations) -> None:
    """All inputs, aligned at the last axis."""
    relations.broadcast(node, range(len(node.inputs)), relations.output(node))


def batch_norm(node: ir.Node, relations: Relations) -> None:
    """BatchNormalization and InstanceNormalization: one scale and shift for each channel."""
    x = relations.input(node, 0)
    relations.tie_all(node, x, relations.output(node))
    for index in range(1, len(node.inputs)):
        relations.tie_all(node, relations.input(node, index), [axis_of(x or [], 1)])
    if node.op_type == "InstanceNormalization" and x is not None:
        relations.hold(node, x[2:], "it is normalized over", "grow")


def group_norm(node: ir.Node, relations: Relations) -> None:
    """GroupNormalization: channels are groups x channels of a group."""
    x, shape, groups = (
        relations.input(node, 0),
        relations.sizes(node.inputs[0]),
        node.attributes.get_int("num_groups", 1),
    )
    if x is None or shape is None or shape[1] is None:
        relations.hold_all(node, "the shape of what it normalizes is not known")
        return
    relations.tie_all(node, x, relations.output(node))
    group, each = Dim(groups), Dim(shape[1] // groups)
    if x[1] is not None:
        relations.tie(node, x[1], Product((group, each)))
    for index in (1, 2):
        for term, size in zip(
            relations.input(node, index) or (), relations.sizes(node.inputs[index]) or (), strict=True
        ):
            if term is not None:
                relations.tie(node, term, group if size == groups else x[1])
    relations.hold(node, (each, *x[2:]), "it is normalized over", "grow")
    relations.attributes[node]["num_groups"] = group


def layer_norm(node: ir.Node, relations: Relations) -> None:
    """LayerNormalization and its kin: scale and shift along the axes that are normalized."""
    y = relations.output(node)
    relations.tie_all(node, relations.input(node, 0), y)
    others = range(1, len(node.inputs))
    for index in others:
        relations.broadcast(node, (index,), y)
    axis = node.attributes.get_int("axis", -1)
    if y is None:
        return
    relations.hold(node, y[axis:], "it is normalized over", "grow")
    for index in range(1, len(node.outputs)):  # the sum, or means that have one position along what is normalized
        for term, whole in zip(relations.output(node, index) or (), y, strict=False):
            if term is not None:
                relations.tie(node, term, whole)


def over_axes(node: ir.Node, relations: Relations) -> None:
    """LpNormalization, MeanVarianceNormalization and LRN."""
    y = relations.output(node)
    relations.tie_all(node, relations.input(node, 0), y)
    default = {"LpNormalization": [-1], "LRN": [1]}.get(node.op_type, [0, 2, 3])
    one = node.attributes.get("axis")
    axes = [one.as_int()] if one is not None else node.attributes.get_ints("axes", default)
    blocks: Blocks = "both" if node.op_type == "LRN" else "grow"
    relations.hold(node, (axis_of(y or [], axis) for axis in axes or ()), "it is normalized over", blocks)


def softmax(node: ir.Node, relations: Relations) -> None:
    """Softmax, LogSoftmax, Hardmax and CumSum: what is done along an axis holds it."""
    y = relations.output(node)
    relations.tie_all(node, relations.input(node, 0), y)
    if node.op_type == "CumSum":
        axes = relations.integers(node, 1, "axis")
        held = y or [] if axes is None else [axis_of(y or [], axes[0])]
    elif relations.opset < 13:  # it takes all that lies from that axis on for one
        held = (y or [])[node.attributes.get_int("axis", 1) :]
    else:
        held = [axis_of(y or [], node.attributes.get_int("axis", -1))]
    relations.hold(node, held, f"{node.op_type} runs over it")


def reduction(node: ir.Node, relations: Relations) -> None:
    """Reduce*, ArgMax and ArgMin."""
    x, y = relations.input(node, 0), relations.output(node)
    found = node.attributes.get("axis")
    axes = [found.as_int()] if found is not None else relations.integers(node, 1, "axes")
    if present(node, 1) and axes is None:
        relations.hold_all(node, "the axes that it reduces are computed")
        return
    if x is None or y is None:
        relations.hold_all(node, "the shape of what it reduces is not known")
        return
    if not axes and not node.attributes.get_int("noop_with_empty_axes", 0):
        axes = [0] if node.op_type.startswith("Arg") else list(range(len(x)))
    reduced = {axis % len(x) for axis in axes or ()}
    kept = [axis for axis in range(len(x)) if axis not in reduced]
    places = kept if node.attributes.get_int("keepdims", 1) else range(len(kept))
    for axis, place in zip(kept, places, strict=True):
        if x[axis] is not None or y[place] is not None:
            relations.tie(node, x[axis], y[place])
    if node.op_type.startswith("Arg") or node.op_type == "ReduceProd":
        relations.hold(node, (x[axis] for axis in reduced), f"{node.op_type} runs over it")
    elif node.op_type not in _ADDS_UP:
        relations.hold(node, (x[axis] for axis in reduced), f"{node.op_type} runs over it", "grow")


def pool(node: ir.Node, relations: Relations) -> None:
    """Pooling and resizing: channels pass, places do not."""
    x, y = relations.input(node, 0), relations.output(node)
    if x is None or y is None or len(x) != len(y):
        relations.hold_all(node, "the shape of what it pools is not known")
        return
    relations.tie_all(node, x[:2], y[:2])
    relations.hold(node, (*x[2:], *y[2:]), "a kernel moves over it")
    if node.op_type == "Resize" and present(node, 3) and "axes" not in node.attributes:
        tell_shape(node, 3, relations, y)
    for axis in node.attributes.get_ints("axes", ()) or ():
        relations.hold(node, (x[axis], y[axis]), "it is resized")


def quantize(node: ir.Node, relations: Relations) -> None:
    """QuantizeLinear and DequantizeLinear, with one scale for all, or for each position of an axis."""
    x, y = relations.input(node, 0), relations.output(node)
    relations.tie_all(node, x, y)
    if is_constant(node.inputs[0]):
        hold_offset(node, 2, x or (), relations)
    for index in (1, 2):
        scales = relations.input(node, index)
        if scales is None or not any(scales):
            continue
        if len(scales) == 1 and x is not None:
            relations.tie(node, scales[0], axis_of(x, node.attributes.get_int("axis", 1)))
        else:
            relations.hold(node, (*scales, *(x or ())), "it is quantized in blocks")
