"""Why one node makes an error: what is known about its operands and its types, in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...errors import EngineError, GraphError
from .distance import Distance, distance
from .parts import UNQUANTIZED, Segment, tensors
from .runtimes import plainly
from .trace import Row, Side, misfit

Arrays = Mapping[str, np.ndarray]

LIMITS = {"float16": 65504.0, "bfloat16": 3.39e38, "float8e4m3fn": 448.0}
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "float8e4m3fn": 2.0**-4}
"""Largest relative error of rounding once."""

_SMALLEST = {"float16": 2.0**-24, "float8e4m3fn": 2.0**-9}
_ACTIVATIONS = frozenset(("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSwish", "Identity"))
_INTEGER_ROUNDING = 2.0**-7
_NOT_A_NUMBER = {
    "Div": "0/0 or inf/inf",
    "Sub": "inf - inf",
    "Add": "inf - inf",
    "Mul": "0 * inf",
    "MatMul": "0 * inf or inf - inf among its products",
    "Sqrt": "the root of a negative number",
    "Log": "the logarithm of a negative number",
    "Pow": "a power of a negative number",
    "Softmax": "a row that holds inf, or -inf only",
}


@dataclasses.dataclass(frozen=True)
class Operand:
    """One input of the operator.

    Attributes:
        low: smallest value in the reference; `high` the largest.
        error: relative L2 of what the engine's operator reads, made of right inputs, to what the reference's reads.
        clipped: share of values outside the range of the quantizer before it; None where there is none.
    """

    name: str
    weight: bool
    low: float | None
    high: float | None
    error: float | None
    clipped: float | None = None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What was found about a node that makes an error.

    Attributes:
        low: smallest value of its tensor in the reference; `high` the largest.
        causes: sentences, the likeliest first.
    """

    operands: tuple[Operand, ...]
    low: float | None
    high: float | None
    causes: tuple[str, ...]


def explain(row: Row, subject: Side, oracle: Side, inputs: Arrays) -> Explanation:
    """Looks at every operand of the row's operator, with the reference's inputs."""
    segment = row.segment
    theirs = _counterpart(oracle, segment)
    pairs = _pairs(segment, theirs)
    reference_names = [right for _, right, _ in pairs]
    right = _values(oracle, inputs, [*reference_names, *segment.leaves, segment.name])
    leaves = {name: right[name] if name not in inputs else inputs[name] for name in segment.leaves}
    inner = _inner(segment)
    mine = _values(Side(subject.graph, plainly), leaves, [*inner, *(name for name, _, _ in pairs)])
    operands = [_operand(segment, mine, right, pair) for pair in pairs]
    truth = right[segment.name]
    made = mine.get(segment.name)
    mine[segment.name + UNQUANTIZED] = truth  # what its quantizer should hold
    plain = distance(truth, made) if made is not None else None
    causes = [
        *_overflow(row, truth, leaves, subject),
        *_operand_causes(operands, mine, right, pairs, row.dtype),
        *_clipping(segment, mine),
        *_born(row, segment),
        *_underflow(row, truth),
        *_cancellation(row, theirs, [right[name] for name in reference_names if name in right], truth),
        *_kernel(row, plain),
    ]
    if not causes:
        causes = [_rounding(row)]
    return Explanation(tuple(operands), *_range(truth), causes=tuple(dict.fromkeys(causes)))


def _counterpart(oracle: Side, segment: Segment) -> ir.Node:
    """The reference's node for the segment's operator: the one that gives the tensor, or that before an activation."""
    made = {value.name: node for node in oracle.graph.model.graph for value in node.outputs}
    node = giver = made[segment.name]
    while node.op_type in _ACTIVATIONS and node.op_type != segment.main.op_type:
        source = node.inputs[0]
        if source is None or source.name not in made:
            break
        node = made[source.name]
    return node if node.op_type == segment.main.op_type else giver


def _pairs(segment: Segment, theirs: ir.Node) -> list[tuple[str, str, bool]]:
    """Names of each operand in the engine's graph and in the reference's, and whether it is a constant."""
    mine = segment.main
    if mine.op_type != theirs.op_type or len(mine.inputs) != len(theirs.inputs):
        return []
    leaves = set(segment.leaves)
    return [
        (a.name or "", b.name or "", a.name not in leaves and not _depends(a, leaves))
        for a, b in zip(mine.inputs, theirs.inputs, strict=True)
        if a is not None and b is not None and _floating(a) and _floating(b)
    ]


def _floating(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _depends(value: ir.Value, leaves: set[str]) -> bool:
    producer = value.producer()
    if value.name in leaves:
        return True
    return producer is not None and any(_depends(v, leaves) for v in producer.inputs if v is not None)


def _inner(segment: Segment) -> list[str]:
    """What the segment's nodes give on the way, and what its quantizers read."""
    made = [value.name for node in segment.nodes for value in node.outputs if value.name]
    quantizers = [node for node in segment.nodes if node.op_type == "QuantizeLinear"]
    return [*made, *(value.name for node in quantizers for value in node.inputs if value is not None and value.name)]


def _values(side: Side, inputs: Arrays, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Tensors of a side: its weights, what was given, and what its nodes make of that."""
    constants = {v.name: v.const_value for v in side.graph.model.graph.initializers.values()}
    known = {name: inputs[name] for name in names if name in inputs}
    known |= {name: t.numpy() for name in names if name not in known and (t := constants.get(name)) is not None}
    try:
        return {**known, **side.values(inputs, [name for name in names if name not in known])}
    except (EngineError, GraphError):
        return known


def _operand(segment: Segment, mine: Arrays, right: Arrays, pair: tuple[str, str, bool]) -> Operand:
    name, theirs, weight = pair
    array = right.get(theirs)
    if array is None:
        return Operand(theirs, weight, None, None, None)
    found = distance(array, mine[name]) if name in mine else None
    shares = [share for node, share in _clipped(segment, mine) if _feeds(node, name, segment)]
    return Operand(theirs, weight, *_range(array), error=_size(found), clipped=max(shares, default=None))


def _feeds(quantizer: ir.Node, name: str, segment: Segment) -> bool:
    reached = {quantizer.outputs[0].name}
    for node in segment.nodes:
        if any(value is not None and value.name in reached for value in node.inputs):
            reached |= {value.name for value in node.outputs if node is not segment.main}
    return name in reached


def _clipped(segment: Segment, mine: Arrays) -> list[tuple[ir.Node, float]]:
    """Each quantizer of an activation, with the share of values outside its range."""
    found = []
    for node in segment.nodes:
        if node.op_type == "QuantizeLinear" and (limits := _limits(node, mine)) is not None:
            array = mine[node.inputs[0].name or ""]  # type: ignore[union-attr]
            low, high, step = limits
            found.append((node, float(np.mean((array < low - step / 2) | (array > high + step / 2)))))
    return found


def _limits(node: ir.Node, mine: Arrays) -> tuple[float, float, float] | None:
    """Lowest and highest value that a quantizer of one scale can give, and its step."""
    names = [value.name if value is not None else None for value in node.inputs]
    dtype = node.outputs[0].dtype
    scale = mine.get(names[1] or "")
    if scale is None or scale.size != 1 or dtype is None or (names[0] or "") not in mine or not dtype.is_integer():
        return None
    bits = np.iinfo(dtype.numpy())
    offset = mine.get(names[2] or "") if len(names) > 2 else None
    zero = float(offset.item()) if offset is not None else 0.0
    step = float(scale.item())
    return (bits.min - zero) * step, (bits.max - zero) * step, step


def _clipping(segment: Segment, mine: Arrays) -> list[str]:
    causes = []
    for node, share in _clipped(segment, mine):
        array = mine[node.inputs[0].name or ""]  # type: ignore[union-attr]
        low, high, step = _limits(node, mine) or (0.0, 0.0, 0.0)
        name = (node.inputs[0].name or "").removesuffix(UNQUANTIZED)  # type: ignore[union-attr]
        if share > 1e-3:
            causes.append(
                f"saturation: the quantizer of {name} clips {share:.2%} of its values: it spans {low:.3g} to "
                f"{high:.3g}, they reach from {array.min():.3g} to {array.max():.3g}"
            )
        elif 0 < (typical := float(np.median(np.abs(array[array != 0])) if array.any() else 0)) < 2 * step:
            wide = max(-low, high) > 4 * float(np.abs(array).max())
            why = f"they reach {np.abs(array).max():.3g} only" if wide else "few large values stretch it"
            causes.append(
                f"a step of the quantizer of {name} is {step:.3g}, beside typical values of {typical:.3g}: it spans "
                f"{low:.3g} to {high:.3g}; {why}"
            )
    return causes


def _overflow(row: Row, truth: np.ndarray, leaves: Arrays, subject: Side) -> list[str]:
    types = {value.name: value.dtype for value in tensors(subject.graph.model.graph)}
    causes = [f"overflow: {text}" for name, array in leaves.items() if (text := misfit(name, array, types.get(name)))]
    limit, reach = LIMITS.get(row.dtype), float(np.abs(truth[np.isfinite(truth)]).max(initial=0.0))
    if limit is not None and reach > limit:
        causes.append(f"overflow: {row.name} reaches {reach:.3g} in the reference; {row.dtype} ends at {limit:g}")
    return causes


def _operand_causes(
    operands: Sequence[Operand], mine: Arrays, right: Arrays, pairs: Sequence[tuple[str, str, bool]], dtype: str
) -> list[str]:
    causes = []
    allowed = 8 * ROUNDING.get(dtype, _INTEGER_ROUNDING)
    for operand, (name, theirs, weight) in zip(operands, pairs, strict=True):
        if operand.error is None or operand.error <= allowed:
            continue
        kind = "weight" if weight else "input"
        a, b = mine[name], right[theirs]
        if weight and not np.isfinite(a.astype(np.float64)).all() and np.isfinite(b).all():
            reach, limit = float(np.abs(b).max()), LIMITS.get(dtype, math.inf)
            why = f"overflow: {dtype} ends at {limit:g}" if reach > limit else "rounding does not explain it"
            causes.append(f"weight {theirs} is not finite in the engine, and reaches {reach:.3g} before; {why}")
        elif weight:
            place = np.unravel_index(int(np.nanargmax(np.abs(a.astype(np.float64) - b))), b.shape)
            causes.append(
                f"weight {theirs} differs from the reference's by {operand.error:.3g} (relative L2), which rounding in "
                f"{dtype} does not explain; most at {list(map(int, place))}: {a[place]:.4g} against {b[place]:.4g}"
            )
        else:
            causes.append(f"reading {kind} {theirs} in {dtype} changes it by {operand.error:.3g} (relative L2)")
    return causes


def _born(row: Row, segment: Segment) -> list[str]:
    local = row.local
    if local is None or not local.nan:
        return []
    how = _NOT_A_NUMBER.get(segment.main.op_type)
    return [f"NaN is born here, in {local.nan} places" + (f": {how}" if how else "")]


def _underflow(row: Row, truth: np.ndarray) -> list[str]:
    smallest = _SMALLEST.get(row.dtype)
    nonzero = np.abs(truth[truth != 0])
    if smallest is None or not nonzero.size:
        return []
    share = float(np.mean(nonzero < smallest / 2))
    return [f"underflow: {share:.1%} of {row.name} are below {smallest:.2g} and become 0"] if share > 0.01 else []


def _cancellation(row: Row, theirs: ir.Node, operands: Sequence[np.ndarray], truth: np.ndarray) -> list[str]:
    """Sums much smaller than their terms lose as many digits as they are smaller."""
    size = float(np.linalg.norm(truth[np.isfinite(truth)].astype(np.float64)))
    absolute = [np.abs(array.astype(np.float64)) for array in operands]
    if theirs.op_type in ("Add", "Sub") and len(absolute) == 2:
        terms = absolute[0] + absolute[1]
    elif theirs.op_type == "MatMul" and len(absolute) == 2:
        terms = absolute[0] @ absolute[1]
    elif theirs.op_type in ("ReduceSum", "ReduceMean", "GlobalAveragePool") and absolute:
        scale = truth.size / absolute[0].size if theirs.op_type != "ReduceSum" else 1.0
        return _cancelled(row, float(np.sum(absolute[0])) * scale / math.sqrt(max(truth.size, 1)), size)
    else:
        return []
    return _cancelled(row, float(np.linalg.norm(terms[np.isfinite(terms)])), size)


def _cancelled(row: Row, terms: float, size: float) -> list[str]:
    ratio = terms / size if size else math.inf
    expected = ratio * ROUNDING.get(row.dtype, _INTEGER_ROUNDING)
    found = row.local.size if row.local is not None else 0.0
    if not 8 < ratio < math.inf or expected < found / 4:
        return []
    return [f"cancellation: its terms are {ratio:.3g} times larger than their sum, so rounding weighs that much more"]


def _kernel(row: Row, plain: Distance | None) -> list[str]:
    found = row.local.size if row.local is not None else 0.0
    if plain is None or not found > 10 * max(plain.size, 1e-7):
        return []
    return [
        f"the runtime's own kernel: run plainly, the same nodes are off by {plain.size:.3g} only, here by {found:.3g}"
    ]


def _rounding(row: Row) -> str:
    once = ROUNDING.get(row.dtype, _INTEGER_ROUNDING)
    if row.local is not None and row.local.size <= 4 * once:
        return f"rounding: {row.dtype} is off by up to {once:.2g} each time; more precision is not in it"
    return f"none of the known causes: rounding in {row.dtype} alone does not explain it"


def _range(array: np.ndarray) -> tuple[float | None, float | None]:
    finite = array[np.isfinite(array)]
    return (float(finite.min()), float(finite.max())) if finite.size else (None, None)


def _size(found: Distance | None) -> float | None:
    return None if found is None else found.size
