"""A GRU as a Scan whose step multiplies in int8; what the inputs add to the gates is computed before, for all steps.

    z, r = sigmoid(x[z, r] + h Rz, h Rr)          x = X W + b, the columns of W in the order z, r, n
    n    = tanh(x[n] + r * (h Rn))                where linear_before_reset is 1, as torch has it
    h    = n + z * (h - n)

With 512 units this runs at 2.3 times the speed of the float GRU, with 1024 at 3.2, with 320 at 1.3, with 256 at 0.9.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..graph.schemas import MICROSOFT
from .patch import Patch, Patcher

OPSET = 13
"""The first whose Split and Unsqueeze take sizes and axes as inputs."""
NARROWEST = 320
"""Fewest units with which the products save more than the steps of a Scan cost."""

_FLOAT = ir.DataType.FLOAT


@dataclasses.dataclass(frozen=True, eq=False)
class Direction:
    """One direction of a GRU.

    Attributes:
        gates: X W without bias, (steps, batch, 3 units).
        weight: R^T (units, 3 units) in int8, with scales and zero points of columns.
        input_bias, bias: (3 units,) of W and of R.
    """

    gates: ir.Value
    weight: tuple[ir.Value, ir.Value, ir.Value]
    input_bias: np.ndarray
    bias: np.ndarray


def unsupported(node: ir.Node, opset: int) -> str | None:
    """Why a GRU is not rewritten; None where it is."""
    attributes = node.attributes
    if opset < OPSET:
        return f"opset {opset} is too old for a GRU in int8; opset {OPSET} is the first"
    if not attributes.get_int("linear_before_reset", 0):
        return "it resets before the product (linear_before_reset=0): a step would wait for two products"
    if attributes.get_int("layout", 0):
        return "its batch axis comes first (layout=1)"
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        return "its sequences have lengths of their own (sequence_lens)"
    activations = attributes.get_strings("activations", ("Sigmoid", "Tanh"))
    if "clip" in attributes or any(a != b for a, b in zip(activations, ("Sigmoid", "Tanh") * 2, strict=False)):
        return "it clips, or has other activations than Sigmoid and Tanh"
    return None


def scans(patch: Patch, patcher: Patcher, node: ir.Node, directions: Sequence[Direction]) -> list[ir.Value]:
    """Adds a Scan for each direction; gives what takes the place of the GRU's outputs that have a name."""
    backward = [node.attributes.get_string("direction", "forward") == "reverse", True]
    states, steps = [], []
    for d, direction in enumerate(directions):
        last, all_steps = _scan(patch, patcher, node, d, direction, backward=backward[d])
        states.append(last)
        steps.append(all_steps)
    results = []
    for place, (output, parts) in enumerate(zip(node.outputs, (steps, states), strict=False)):
        if output.name:
            axis = 1 - place
            results.append(_stacked(patch, patcher, parts, axis, output))
    return results


def _stacked(patch: Patch, patcher: Patcher, parts: Sequence[ir.Value], axis: int, output: ir.Value) -> ir.Value:
    axes = patcher.initializer(f"{patch.title}/axes", np.array([axis]))
    shape = output.shape if len(parts) == 1 else None
    named = [(f"{output.name}/direction", _FLOAT, shape)]
    unsqueezed = [patch.add("Unsqueeze", [part, axes], named)[0] for part in parts]
    if len(parts) == 1:
        return unsqueezed[0]
    return patch.add("Concat", unsqueezed, [(f"{output.name}/directions", _FLOAT, output.shape)], {"axis": axis})[0]


def _scan(
    patch: Patch, patcher: Patcher, node: ir.Node, d: int, direction: Direction, *, backward: bool
) -> tuple[ir.Value, ...]:
    """The last state (batch, units) and all of them (steps, batch, units)."""
    title = patch.title
    bias = patcher.initializer(f"{title}/input_bias", direction.input_bias)
    (gates,) = patch.add("Add", [direction.gates, bias], [(f"{title}/gates", _FLOAT, direction.gates.shape)])
    units = len(direction.bias) // 3
    body = _body(patcher, title, direction, units)
    attributes: dict[str, int | float | str | Sequence[float] | Sequence[str] | ir.Graph] = {
        "body": body,
        "num_scan_inputs": 1,
    }
    if backward:
        attributes |= {"scan_input_directions": [1], "scan_output_directions": [1]}
    outputs = [(f"{title}/last", _FLOAT, None), (f"{title}/steps", _FLOAT, None)]
    return patch.add("Scan", [_first(patch, patcher, node, d, units), gates], outputs, attributes, main=d == 0)


def _first(patch: Patch, patcher: Patcher, node: ir.Node, d: int, units: int) -> ir.Value:
    """The state before the first step, (batch, units)."""
    title = patch.title
    given = node.inputs[5] if len(node.inputs) > 5 else None
    if given is not None:
        index = patcher.initializer(f"{title}/direction", np.array(d))
        return patch.add("Gather", [given, index], [(f"{title}/first", _FLOAT, None)], {"axis": 0})[0]
    one, size = (
        patcher.initializer(f"{title}/{name}", np.array([n])) for name, n in (("batch_axis", 1), ("units", units))
    )
    (shape,) = patch.add("Shape", [node.inputs[0]], [(f"{title}/shape", ir.DataType.INT64, ir.Shape([3]))])
    (batch,) = patch.add("Gather", [shape, one], [(f"{title}/batch", ir.DataType.INT64, ir.Shape([1]))])
    (both,) = patch.add(
        "Concat", [batch, size], [(f"{title}/state_shape", ir.DataType.INT64, ir.Shape([2]))], {"axis": 0}
    )
    return patch.add("ConstantOfShape", [both], [(f"{title}/first", _FLOAT, None)])[0]


def _body(patcher: Patcher, title: str, direction: Direction, units: int) -> ir.Graph:
    """One step: from the state and the gates' inputs to the state, twice."""
    nodes: list[ir.Node] = []

    def value(name: str, columns: int) -> ir.Value:
        shape = ir.Shape([None, columns])
        return ir.Value(name=patcher.name(f"{title}/step/{name}"), type=ir.TensorType(_FLOAT), shape=shape)

    def add(operator: str, inputs: Sequence[ir.Value | None], *columns: int, **attributes: int) -> list[ir.Value]:
        outputs = [value(operator, count) for count in columns]
        domain = MICROSOFT if operator == "DynamicQuantizeMatMul" else ""
        name = patcher.node_name(f"{title}/step/{operator}")
        nodes.append(ir.node(operator, inputs, attributes, domain=domain, outputs=outputs, name=name))
        return outputs

    patcher.graph.model.opset_imports.setdefault(MICROSOFT, 1)
    state, gates = value("state", units), value("input", 3 * units)
    sizes = patcher.initializer(f"{title}/sizes", np.array([2 * units, units]))
    halves = patcher.initializer(f"{title}/halves", np.array([units, units]))
    bias = patcher.initializer(f"{title}/bias", direction.bias)
    numbers, scale, zero = direction.weight
    (product,) = add("DynamicQuantizeMatMul", [state, numbers, scale, zero, bias], 3 * units)
    product_zr, product_n = add("Split", [product, sizes], 2 * units, units, axis=1)
    gates_zr, gates_n = add("Split", [gates, sizes], 2 * units, units, axis=1)
    (sum_zr,) = add("Add", [gates_zr, product_zr], 2 * units)
    (zr,) = add("Sigmoid", [sum_zr], 2 * units)
    z, r = add("Split", [zr, halves], units, units, axis=1)
    (reset,) = add("Mul", [r, product_n], units)
    (sum_n,) = add("Add", [gates_n, reset], units)
    (n,) = add("Tanh", [sum_n], units)
    (difference,) = add("Sub", [state, n], units)
    (share,) = add("Mul", [z, difference], units)
    (after,) = add("Add", [n, share], units)
    (step,) = add("Identity", [after], units)
    return ir.Graph([state, gates], [after, step], nodes=nodes, name=f"{title}/step")
