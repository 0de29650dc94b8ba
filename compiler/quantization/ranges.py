"""The range of each activation of a plan: from calibration, one for all of a group."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import onnx_ir as ir

from ..calibration import Method, Statistics, TensorStatistics, limits
from ..graph import Graph
from .parameters import Parameters, activation_parameters
from .plan import Plan

Choice = Literal["auto", Method]
"""A method, or "auto": least squared error, but the whole range for what MatMul and Gemm multiply. A few channels of
transformers hold outliers there that carry meaning, and that clipping makes wrong the same way each time.

Signal to noise by mse and minmax: MiniLM 17.1 and 18.6 dB, with SmoothQuant 18.2 and 21.0; ResNet-50 30.3 and 28.2."""

_BALANCED = 0.5
"""How far below zero, as a share of how far above it, a symmetric range of signed numbers loses little."""
_LEAST = 0.8
"""Part of what batches reach on average that "auto" never clips: histograms hold a part of the values, and of few
images the tail may be missing. ResNet-50 on 32 images, over three seeds each: 31.44 dB on one split of the images and
31.18 on another, without it 31.45 and 31.13; with every value counted, 31.63 and 31.26, without it 31.63 and 31.28."""

_PRODUCTS = frozenset(("Gemm", "MatMul"))


@dataclasses.dataclass(frozen=True)
class Limit:
    """How an activation is quantized, for people.

    Attributes:
        low, high: what the quantized numbers can tell.
        scale: the step between them.
        clipped: share of the calibrated values beyond these limits.
        minimum, maximum: of the calibrated values.
        group: how many activations share the range.
    """

    name: str
    low: float
    high: float
    scale: float
    clipped: float
    minimum: float
    maximum: float
    method: str
    group: int

    def row(self) -> dict[str, Any]:
        """As JSON takes it."""
        return dataclasses.asdict(self)


def unknown(graph: Graph, plan: Plan, statistics: Statistics) -> dict[ir.Node, str]:
    """Nodes that read an activation without a range through Q/DQ, or give it, and why."""
    found: dict[ir.Node, str] = {}
    main = graph.model.graph
    for value in (*main.inputs, *(output for node in main for output in node.outputs)):
        name = value.name or ""
        if name not in plan.activations or name in statistics:
            continue
        reason = "has no finite value" if name in statistics.empty else "holds a mask, NaN or infinite values"
        around = {use.node for use in plan.activations[name]} | (set(_behind(value.producer())) & plan.nodes)
        found.update({node: f"{name!r} {reason} on the data" for node in around if node is not None})
    return found


def _behind(node: ir.Node | None) -> Iterator[ir.Node]:
    """A node, and the one that it takes its first operand from: the result of a Conv lies behind its Relu."""
    if node is not None:
        yield node
        before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        yield from () if before is None else (before,)


def methods(plan: Plan, method: Choice) -> dict[str, Method]:
    """The method for each activation of the plan."""
    if method != "auto":
        return dict.fromkeys(plan.activations, method)
    multiplied = {
        name
        for name, uses in plan.activations.items()
        if any(use.node is not None and use.node.op_type in _PRODUCTS for use in uses)
    }
    return {name: "minmax" if name in multiplied else "mse" for name in plan.activations}


def activation_ranges(plan: Plan, statistics: Statistics, method: Choice) -> tuple[dict[str, Parameters], list[Limit]]:
    """Parameters for each activation of the plan, and the table of them.

    Raises:
        KeyError: an activation has no statistics; see `unknown`.
    """
    chosen_by = methods(plan, method)
    chosen: dict[str, tuple[float, float]] = {
        name: _limits(statistics[name], own, plan, least=_LEAST if method == "auto" else 0.0)
        for name, own in chosen_by.items()
    }
    parameters: dict[str, Parameters] = {}
    table = []
    for name in plan.activations:
        group = plan.group_of(name)
        low = min(chosen[member][0] for member in group)
        high = max(chosen[member][1] for member in group)
        balanced = -low >= _BALANCED * high and not group.isdisjoint(plan.padded)
        dtype = ir.DataType.INT8 if balanced else plan.dtype
        found = activation_parameters(low, high, dtype, symmetric=balanced or plan.symmetric)
        parameters[name] = found
        table.append(_limit(name, found, statistics, chosen_by[name], len(group)))
    return parameters, table


def _limits(statistics: TensorStatistics, method: Method, plan: Plan, *, least: float) -> tuple[float, float]:
    low, high = limits(statistics, method, symmetric=plan.symmetric)
    if method != "mse" or not least:
        return low, high
    reached = limits(statistics, "moving-average", symmetric=plan.symmetric)
    return min(low, least * reached[0]), max(high, least * reached[1])


def _limit(name: str, found: Parameters, statistics: Mapping[str, Any], method: str, group: int) -> Limit:
    own = statistics[name]
    low, high = float(found.low), float(found.high)
    return Limit(
        name=name,
        low=low,
        high=high,
        scale=float(found.scale),
        clipped=own.clipped(low, high),
        minimum=own.low,
        maximum=own.high,
        method=method,
        group=group,
    )
