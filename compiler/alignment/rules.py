"""What each operator makes of the new positions of a dimension: the table that `evaluate` goes by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ..dimensions import Dim, Dimensions
from ..dimensions.layout import Term, leaves
from ..dimensions.pointwise import BROADCAST, UNARY
from .lanes import FINITE, UNSAFE, ZERO, Lane, Operand, computed, join, of

Operands = Sequence[Operand | None]


@dataclasses.dataclass(frozen=True)
class Place:
    """The dimension that is looked at, in its graph."""

    dimensions: Dimensions
    dim: Dim

    def within(self, *terms: Term | None) -> bool:
        """Whether the dimension is a part of one of these axes."""
        return any(self.dim in leaves(term) for term in terms if term is not None)

    def of(self, node: ir.Node, index: int, axis: int) -> Term | None:
        """An axis of an input."""
        axes = self.dimensions.relations.input(node, index) or []
        return axes[axis] if -len(axes) <= axis < len(axes) else None


_TAME = frozenset((
    "Abs", "Asinh", "Atan", "BiasGelu", "Cast", "Ceil", "Celu", "Clip", "Cos", "Dropout", "Elu", "Erf", "FastGelu",
    "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Mish", "Neg", "Not",
    "QuickGelu", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Swish", "Tanh",
    "ThresholdedRelu",
    "Add", "And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mul", "Or",
    "PRelu", "Sub", "Sum", "Where", "Xor",
))  # fmt: skip
"""Elementwise operators that make finite numbers of any finite numbers of moderate size."""

_ZERO_AT_ZERO = frozenset(("BiasGelu", "FastGelu", "Gelu", "QuickGelu"))
"""Operators outside the standard that make 0 of 0."""


def after(node: ir.Node, operands: Operands, place: Place) -> Lane | str:
    """What the outputs hold at new positions, or why the dimension must not grow, as a clause."""
    carrying = [operand.lane for operand in operands if operand is not None and operand.lane is not None]
    rule = _RULES.get(node.op_type)
    if not carrying:
        return f"what {node.op_type} puts in new places is not known"
    if UNSAFE in carrying:
        return f"{node.op_type} would meet NaN or infinity in new places"
    if rule is not None:
        return rule(node, operands, place)
    if node.op_type in UNARY | BROADCAST:
        return _elementwise(node, operands, place)
    return f"what {node.op_type} makes of new places is not known"


def _elementwise(node: ir.Node, operands: Operands, place: Place) -> Lane | str:
    found = computed(node, operands, place.dimensions.graph.opset)
    given = [operand for operand in operands if operand is not None]
    zeros = [operand.lane is not None and operand.lane.is_zero for operand in given]
    if found is None and node.op_type == "Mul" and any(zeros):
        found = ZERO
    elif found is None and node.op_type == "Div" and given[1].lane is None:  # real places are divided by the same
        found = ZERO if zeros[0] else FINITE
    elif found is None and node.op_type in _ZERO_AT_ZERO and all(zeros):
        found = ZERO
    elif found is None and node.op_type == "Where":
        found = join(of(one.known) if one.known is not None else FINITE for one in given[1:])
    elif found is None and (node.op_type in _TAME or _is_whole_power(node, given)):
        found = FINITE
    if found is None or not found.safe:
        return f"{node.op_type} may make NaN or infinity in new places"
    return found


def _is_whole_power(node: ir.Node, given: Sequence[Operand]) -> bool:
    exponents = given[1].known if node.op_type == "Pow" else None
    return exponents is not None and bool(((exponents >= 0) & (exponents == np.floor(exponents))).all())


def _moved(node: ir.Node, operands: Operands, place: Place) -> Lane | str:
    """Operators that move what is there."""
    return join(operand.lane for operand in operands if operand is not None and operand.lane is not None)


def _product(node: ir.Node, operands: Operands, place: Place) -> Lane | str:
    """A product: what is summed over has to add nothing; what is made is 0 where a factor is."""
    zero = any(operand is not None and operand.lane is not None and operand.lane.is_zero for operand in operands[:2])
    if node.op_type.endswith("Integer"):
        zero = _is_zero_point(operands)
    if place.within(*_summed(node, place)) and not zero:
        return f"{node.op_type} sums over new places, and neither factor is 0 there"
    added = operands[2] if len(operands) > 2 and not node.op_type.endswith("Integer") else None
    shifted = added is not None and not (added.lane is not None and added.lane.is_zero)
    return ZERO if zero and not shifted else FINITE


def _is_zero_point(operands: Operands) -> bool:
    """Whether the new places of an integer weight hold its zero point."""
    weight = operands[1].known if operands[1] is not None and operands[1].lane is not None else None
    offset = operands[3].known if len(operands) > 3 and operands[3] is not None else np.zeros(1)
    return weight is not None and offset is not None and bool((offset == weight).all())


def _summed(node: ir.Node, place: Place) -> Sequence[Term | None]:
    """The axes that a product sums over."""
    if node.op_type.startswith("MatMul"):
        return (place.of(node, 0, -1),)
    if node.op_type == "Gemm":
        return (place.of(node, 0, 1 - node.attributes.get_int("transA", 0)),)
    if node.op_type == "ConvTranspose":
        group = place.dimensions.relations.attributes[node].get("group")
        kept = set(leaves(group)) if group is not None and not isinstance(group, list) else set()
        into = place.of(node, 0, 1)
        return [dim for dim in leaves(into) if dim not in kept] if into is not None else ()
    return (place.of(node, 1, 1),)


def _einsum(node: ir.Node, operands: Operands, place: Place) -> Lane | str:
    inputs, _, output = node.attributes.get_string("equation", "").replace(" ", "").partition("->")
    zero = any(one is not None and one.lane is not None and one.lane.is_zero for one in operands)
    for index, letters in enumerate(inputs.split(",")):
        summed = [place.of(node, index, axis) for axis, letter in enumerate(letters) if letter not in output]
        if place.within(*summed) and not zero:
            return "Einsum sums over new places, and no factor is 0 there"
    return ZERO if zero else FINITE


def _recurrent(node: ir.Node, operands: Operands, place: Place) -> Lane | str:
    """With weights and states of 0 every gate's tanh is 0, and so is the state."""
    if place.within(place.of(node, 0, 2)) and not (operands[1] and operands[1].lane and operands[1].lane.is_zero):
        return f"{node.op_type} sums over new places, and its weight is not 0 there"
    states = [operand.lane for operand in operands[5:7] if operand is not None]
    plain = "activations" not in node.attributes and all(lane is not None and lane.is_zero for lane in states)
    return ZERO if plain else FINITE


def _attention(node: ir.Node, operands: Operands, place: Place) -> Lane | str:
    query, key, value = (operand.lane if operand is not None else None for operand in operands[:3])
    scores = [lane for lane in (query, key) if lane is not None]
    if scores and not any(lane.is_zero for lane in scores):
        return "Attention sums over new places, and neither queries nor keys are 0 there"
    return value if value is not None and value.is_zero else FINITE


def _reduction(node: ir.Node, operands: Operands, place: Place) -> Lane | str:
    """More zeros leave a sum as it is; along other axes the new places are reduced for themselves."""
    assert operands[0] is not None
    lane, axes = operands[0].lane or FINITE, place.dimensions.relations.input(node, 0) or []
    over = [axes[axis] for axis in _reduced(node)] or axes
    if place.within(*over):
        return lane if lane.is_zero else f"{node.op_type} sums over new places, which are not 0"
    if node.op_type == "ReduceLogSum" and not (lane.number or 0) > 0:
        return "ReduceLogSum may make NaN or infinity in new places"
    alike = node.op_type in ("ReduceMax", "ReduceMean", "ReduceMin") or (
        lane.is_zero and node.op_type not in ("ReduceLogSumExp", "ArgMax", "ArgMin")
    )
    return lane if alike else FINITE


def _reduced(node: ir.Node) -> Sequence[int]:
    """The axes that are reduced; none where all are."""
    if (one := node.attributes.get("axis")) is not None:
        return (one.as_int(),)
    if "axes" in node.attributes:
        return node.attributes.get_ints("axes") or ()
    given = node.inputs[1] if len(node.inputs) > 1 else None
    return [] if given is None or given.const_value is None else given.const_value.numpy().reshape(-1).tolist()


def _zero_stays(node: ir.Node, operands: Operands, place: Place) -> Lane | str:
    """Pooling: a window of zeros is 0."""
    assert operands[0] is not None
    return ZERO if operands[0].lane is not None and operands[0].lane.is_zero else FINITE


def _finite(node: ir.Node, operands: Operands, place: Place) -> Lane | str:
    """Softmax and its like along other axes, and what only reads the length."""
    return FINITE


def _batch_norm(node: ir.Node, operands: Operands, place: Place) -> Lane | str:
    """Scale and shift are 0 in new places, and so is the result."""
    scaled = [one.lane for one in operands[1:3] if one is not None]
    return ZERO if all(lane is not None and lane.is_zero for lane in scaled) else FINITE


def _normalized_rows(node: ir.Node, operands: Operands, place: Place) -> Lane | str:
    """Along other axes: epsilon keeps a row of zeros from being divided by zero."""
    if node.attributes.get_float("epsilon", 1e-5) <= 0:
        return f"{node.op_type} divides by the size of rows that are 0"
    return FINITE


def _quantized(node: ir.Node, operands: Operands, place: Place) -> Lane | str:
    """(x - zero point) * scale and its inverse, with the numbers that new places have."""
    x, scale = operands[0], operands[1]
    zero_point = operands[2] if len(operands) > 2 else None
    numbers = [one.known for one in (x, scale, zero_point) if one is not None]
    if any(array is None for array in numbers):
        return FINITE
    values, scales, *offsets = (np.asarray(array, dtype=np.float64).reshape(-1) for array in numbers)
    offset = offsets[0] if offsets else np.zeros(1)
    if len({len(array) for array in (scales, offset)} - {1}) > 1:
        return FINITE
    if node.op_type == "DequantizeLinear":
        return of((values - offset) * scales)
    return of(offset + np.rint(values / scales)) if values.any() else of(offset)


def _dynamically_quantized(node: ir.Node, operands: Operands, place: Place) -> Lane | str:
    """The range holds 0 in any case, so that zeros do not change it; they become the zero point."""
    assert operands[0] is not None
    if operands[0].lane is None or not operands[0].lane.is_zero:
        return "DynamicQuantizeLinear takes its range from new places, which are not 0"
    return FINITE


_RULES: Mapping[str, Callable[[ir.Node, Operands, Place], Lane | str]] = {
    **dict.fromkeys(
        ("Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice"), _moved
    ),
    **dict.fromkeys(("SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"), _moved),
    **dict.fromkeys(("Conv", "ConvInteger", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger"), _product),
    "Einsum": _einsum,
    **dict.fromkeys(("GRU", "LSTM", "RNN"), _recurrent),
    "Attention": _attention,
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax"), _reduction),
    **dict.fromkeys(("ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"), _reduction),
    **dict.fromkeys(("ArgMax", "ArgMin"), _reduction),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool"), _zero_stays),
    **dict.fromkeys(("LpPool", "MaxPool"), _zero_stays),
    **dict.fromkeys(("CumSum", "Hardmax", "LogSoftmax", "Resize", "Softmax", "Upsample"), _finite),
    **dict.fromkeys(("BatchNormalization", "GroupNormalization", "InstanceNormalization"), _batch_norm),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"), _normalized_rows),
    **dict.fromkeys(
        ("MeanVarianceNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), _normalized_rows
    ),
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), _quantized),
    "DynamicQuantizeLinear": _dynamically_quantized,
    "Shape": _finite,
}
