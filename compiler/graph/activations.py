"""What the data says about the smaller type: nodes whose tensors it cannot hold stay in float32.

A tensor's producer and consumers stay where it
- overflows, or might on other data;
- is so small that it has at most 8 bits (below 7.6e-6 in float16);
- has magnitudes that round to zero and no zeros by itself, and leads to a logarithm or a division by it;
- is the argument of Sin or Cos, and so large that it is rounded by more than 2 ** -8.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ..calibration.observe import observe
from ..data import Samples
from .formats import Format
from .graph import Graph
from .neighbours import ROOTS, before, keep_around, producers, reach
from .precision import is_float, keep

if TYPE_CHECKING:
    from ..calibration import Calibration

BATCHES = 32
"""How many batches of data are run where there is no calibration."""

HEADROOM = 2.0
"""How much larger than on this data values may get elsewhere. Negative ones have none: clamped masks lie there."""

_ANGLE = 2.0**-8
_LOST = 2.0**3


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a tensor held.

    Attributes:
        low, high: of all finite values.
        smallest: smallest magnitude, 0 where there are zeros; infinite where that was not measured.
    """

    low: float
    high: float
    smallest: float = np.inf

    @property
    def peak(self) -> float:
        """The largest magnitude."""
        return max(abs(self.low), abs(self.high))


def measure(graph: Graph, samples: Samples, calibration: Calibration | None) -> dict[str, Measured]:
    """Measures the float tensors of the main graph, by the calibration where there is one.

    Raises:
        DataError, GraphError, TargetUnavailableError: the data does not run through the graph.
    """
    if calibration is None:
        found = observe(graph, itertools.islice(samples, BATCHES)).everything()
        return {name: Measured(s.low, s.high) for name, s in found.items()}
    everything = calibration.statistics(graph).everything()
    return {name: Measured(s.low, s.high, 0.0 if s.zeros else s.smallest) for name, s in everything.items()}


def keep_activations(graph: Graph, to: Format, measured: Mapping[str, Measured]) -> None:
    """Marks the nodes around tensors that the type cannot hold."""
    main = graph.model.graph
    for value in (*main.inputs, *(output for node in main for output in node.outputs)):
        found = measured.get(value.name or "")
        if found is None or not is_float(value):
            continue
        if reason := _unfit(value, found, to):
            for node in (*producers(value), *value.consumers()):
                keep(node, reason)
        elif 0 < found.smallest < to.smallest / 2 and _leads_to_pole(value):
            reason = f"{value.name!r}, a divisor, falls to {found.smallest:.1g}, which {to.name} rounds to zero"
            for node in (*producers(value), *value.consumers()):
                keep_around(node, reason)
    for node in main:
        if node.op_type in ("Cos", "Sin"):
            _keep_angle(node, to, measured)


def _unfit(value: ir.Value, found: Measured, to: Format) -> str | None:
    if found.high > to.largest / HEADROOM or found.low < -to.largest:
        return f"tensor {value.name!r} reaches {found.peak:.3g} on the data, {to.name} ends at {to.largest:.5g}"
    if 0 < found.peak < to.normal / _LOST:
        return f"tensor {value.name!r} stays below {found.peak:.1g} on the data, where {to.name} loses digits"
    return None


def _leads_to_pole(value: ir.Value) -> bool:
    """Whether a logarithm is taken of it, or something is divided by it or its root."""
    pending, seen = [value], {value}
    while pending:
        current = pending.pop()
        for node in current.consumers():
            if node.op_type in ("Log", "Reciprocal") or (node.op_type == "Div" and node.inputs[1] is current):
                return True
            if node.op_type in ROOTS:
                pending.extend(output for output in node.outputs if output not in seen)
                seen.update(node.outputs)
    return False


def _keep_angle(node: ir.Node, to: Format, measured: Mapping[str, Measured]) -> None:
    """Keeps Sin or Cos of large angles, as of positions, and what makes these angles."""

    def coarse(value: ir.Value | None) -> bool:
        found = measured.get(value.name or "") if value is not None else None
        return found is not None and found.peak * 2.0**-to.bits > _ANGLE

    if not coarse(node.inputs[0]):
        return
    reason = f"takes the {'sine' if node.op_type == 'Sin' else 'cosine'} of angles that {to.name} rounds too coarsely"
    keep(node, reason)
    for earlier in reach(node, before, lambda n: any(map(coarse, n.inputs))):
        if any(map(coarse, earlier.outputs)):
            keep(earlier, reason)
