"""What float16 and bfloat16 cannot hold: which nodes of a float32 graph must stay as they are, and why.

A node stays that
- has an operator that does not take the smaller type at the graph's opset, or a type that is not known;
- has a weight beyond the largest number (65504 in float16);
- adds an epsilon that rounds to zero, with the sum of squares before it and the division after it;
- computes integers, which float16 counts exactly to 2048 only, bfloat16 to 256;
- sums much, or squares and exponentials (`reductions`);
- makes or takes tensors that the type cannot hold on the data (`activations`);
- is quantized together with a node that stays;
- is light and lies between such nodes, where casts would cost more than they save.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ...errors import DataError, GraphError, TargetUnavailableError
from ..data import Samples
from .activations import keep_activations, measure
from .formats import Format
from .graph import Graph
from .neighbours import after, before, keep_around, neighbours, producers, reach
from .precision import HEAVY, Lowering, is_float, keep, kept
from .reductions import keep_sums

if TYPE_CHECKING:
    from ..calibration import Calibration

_MASK_OPERATORS = frozenset((
    "Add", "Cast", "Concat", "Expand", "Gather", "Identity", "Max", "Min", "Mul", "Reshape", "ScatterND",
    "Slice", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where",
))  # fmt: skip
_COUNTING = frozenset((
    "Add", "Ceil", "Clip", "Div", "Expand", "Floor", "Identity", "Max", "Min", "Mul", "Range", "Reshape",
    "Round", "Sub", "Unsqueeze",
))  # fmt: skip
_QUANTIZING = frozenset(("DequantizeLinear", "QuantizeLinear"))
_INTEGERS = frozenset((
    "INT4", "INT8", "INT16", "INT32", "INT64", "UINT4", "UINT8", "UINT16", "UINT32", "UINT64",
))  # fmt: skip


def judge(
    graph: Graph, lowering: Lowering, to: Format, samples: Samples | None, calibration: Calibration | None
) -> Iterator[str]:
    """Marks the nodes that stay; yields why something could not be judged."""
    _keep_illegal(graph, lowering, to)
    _keep_extreme_weights(graph, to)
    _keep_integers(graph, to)
    keep_sums(graph, to)
    if samples is None:
        yield "activations were not checked for overflow: there is no data"
    else:
        try:
            keep_activations(graph, to, measure(graph, samples, calibration))
        except (DataError, GraphError, TargetUnavailableError) as error:
            yield f"activations were not checked for overflow: {error}"
        if any(True for _ in graph.model.graph.subgraphs()):
            yield "activations inside branches and loops were not checked for overflow"
    settle(graph)


def settle(graph: Graph) -> None:
    """Marks what stays because of its neighbours; to be called when all others are marked."""
    _keep_quantized(graph)
    _keep_between(graph)


def clamp_masks(graph: Graph, to: Format) -> int:
    """Raises constants that only mask, and are below what the type holds, to half of that; returns how many.

    Softmax gives zero as before, and the sum with a score or a second mask stays finite: beyond the largest number it
    is infinite, and a row of nothing but minus infinity gives NaN.
    """
    clamped = 0
    mask = -to.largest / 2
    for value, array, replace in _constants(graph):
        if _finite(array).min(initial=0) < -to.largest and _is_mask(value):
            replace(np.where(np.isfinite(array) & (array < mask), np.float32(mask), array))
            clamped += 1
    return clamped


def _is_mask(value: ir.Value) -> bool:
    """Whether a constant is added to, multiplied into or chosen among what goes to Softmax, and to nothing else."""
    pending, seen, found = [value], {value}, False
    while pending:
        current = pending.pop()
        if current.is_graph_output():
            return False
        for node in current.consumers():
            if node.op_type in ("Attention", "LogSoftmax", "MultiHeadAttention", "Softmax"):
                found = True
            elif node.op_type in _MASK_OPERATORS:
                pending.extend(output for output in node.outputs if output not in seen)
                seen.update(node.outputs)
            else:
                return False
    return found


def _keep_illegal(graph: Graph, lowering: Lowering, to: Format) -> None:
    for node in graph.nodes():
        unknown = [v.name for v in (*node.inputs, *node.outputs) if v is not None and v.name and v.type is None]
        if unknown:
            keep(node, f"the type of {unknown[0]!r} is not known")
        elif node.op_type == "BitCast":
            keep(node, "BitCast reads the bits of float32")
        elif lowering.legal(node) is False:
            keep(node, f"{node.op_type} takes no {to.name} at opset {graph.model.opset_imports.get(node.domain)}")


def _keep_extreme_weights(graph: Graph, to: Format) -> None:
    for value, array, _ in _constants(graph):
        finite = _finite(array)
        peak = max(float(finite.max(initial=0)), -float(finite.min(initial=0)))
        for node in (*value.consumers(), *producers(value)):
            if peak > to.largest:
                keep(node, f"weight {value.name!r} reaches {peak:.3g}, {_end(to)}")
            elif node.op_type in _QUANTIZING and 0 < float(finite.min(initial=np.inf)) < to.normal:
                keep(node, f"scale {value.name!r} falls to {finite.min():.1g}, where {to.name} loses digits")
            elif 0 < peak < to.smallest:
                keep_around(node, f"{value.name!r} is {peak:.1g}, which {to.name} rounds to zero")


def _end(to: Format) -> str:
    return f"{to.name} ends at {to.largest:.5g}"


def _keep_integers(graph: Graph, to: Format) -> None:
    reason = f"computes integers, which {to.name} counts exactly to {2**to.bits} only"
    for node in graph.nodes():
        if node.op_type != "Cast" or not is_float(node.inputs[0]):
            continue
        if ir.DataType(node.attributes["to"].as_int()).name in _INTEGERS:
            keep(node, reason)
            for earlier in reach(node, before, lambda n: n.op_type in _COUNTING):
                if earlier.op_type in _COUNTING:
                    keep(earlier, reason)


def _keep_quantized(graph: Graph) -> None:
    """Keeps Q/DQ and the nodes that they are fused with in one precision: a cast between would prevent that."""
    reason = "a cast between it and the quantization beside it would break a kernel in integers"
    pending = [node for node in graph.nodes() if kept(node)]
    while pending:
        node = pending.pop()
        if node.op_type in _QUANTIZING:
            found = after(node) if node.op_type == "DequantizeLinear" else []
        else:
            found = [other for other in before(node) if other.op_type == "DequantizeLinear"]
            if found:
                found += [other for other in after(node) if other.op_type == "QuantizeLinear"]
        for other in found:
            if kept(other) is None:
                keep(other, reason)
                pending.append(other)


def _keep_between(graph: Graph) -> None:
    """Keeps regions of light nodes that touch nothing but kept nodes."""
    light = {node for node in graph.nodes() if kept(node) is None and node.op_type not in HEAVY | {"Cast"}}
    while light:
        start = light.pop()
        region = _region(start, light)
        light -= region
        around = {other for node in region for other in neighbours(node)} - region
        if around and all(map(kept, around)) and not any(map(_at_border, region)):
            for node in region:
                keep(node, "lies between nodes that stay in float32")


def _region(start: ir.Node, among: set[ir.Node]) -> set[ir.Node]:
    return {start, *reach(start, lambda n: [other for other in neighbours(n) if other in among], lambda n: True)}


def _at_border(node: ir.Node) -> bool:
    inputs = any(value is not None and is_float(value) and value.is_graph_input() for value in node.inputs)
    return inputs or any(value.is_graph_output() for value in node.outputs)


def _constants(graph: Graph) -> Iterator[tuple[ir.Value, np.ndarray, Callable[[np.ndarray], None]]]:
    """Float32 constants: the tensor that holds one, the values, and how to replace them."""
    for scope in graph.graphs():
        for value in scope.initializers.values():
            if is_float(value) and value.const_value is not None and not value.is_graph_input():
                yield value, value.const_value.numpy(), functools.partial(_set_weight, value)
        for node in scope:
            if node.op_type == "ConstantOfShape" and "value" in node.attributes and is_float(node.outputs[0]):
                yield node.outputs[0], node.attributes["value"].as_tensor().numpy(), functools.partial(_set_fill, node)


def _set_weight(value: ir.Value, array: np.ndarray) -> None:
    value.const_value = ir.Tensor(array, name=value.name)


def _set_fill(node: ir.Node, array: np.ndarray) -> None:
    node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(array))


def _finite(array: np.ndarray) -> np.ndarray:
    whole = np.isfinite(array.min(initial=0)) and np.isfinite(array.max(initial=0))
    return array if whole else array[np.isfinite(array)]
