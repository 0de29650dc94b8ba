"""What limits a layer: the roofline model of Williams, Waterman and Patterson (CACM 52, 2009), with launches added.

    limit = max(operations / peak, bytes / bandwidth) + launch

A layer is bound by whichever of the three is the largest. What it takes beyond its limit is the kernel's own, so an
estimate for other work scales the time that was measured:

    time after = time before x limit after / limit before
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from ...targets.profile import LayerTime
from ..graph.work import Work
from ..manifest import Bound
from .ceilings import Ceilings


@dataclasses.dataclass(frozen=True)
class Roof:
    """The ceilings over one engine.

    Attributes:
        call_bytes: what a call of the engine moves in all.
        graphed: whether its launches are replayed as a CUDA graph.
    """

    ceilings: Ceilings
    call_bytes: float
    graphed: bool = False

    def parts_ms(self, work: Work, *, aligned: bool = True) -> dict[Bound, float]:
        """The least time of each kind."""
        return {
            "compute": self.ceilings.compute_ms(work, aligned=aligned),
            "bandwidth": self.ceilings.bandwidth_ms(work, self.call_bytes),
            "launch": self.ceilings.launch_ms(graph=self.graphed),
        }

    def limit_ms(self, work: Work, *, aligned: bool = True) -> float:
        """The least time that a kernel could take."""
        parts = self.parts_ms(work, aligned=aligned)
        return max(parts["compute"], parts["bandwidth"]) + parts["launch"]

    def bound(self, layer: LayerTime, work: Work | None) -> Bound:
        """What limits a layer; `work` is None where it is not known."""
        if layer.transfer:
            return "transfer"
        if self.ceilings.device == "cuda" and layer.device == "cpu":
            return "cpu-placed"
        if work is None:
            return "launch" if layer.ms <= 2 * self.ceilings.launch_ms(graph=self.graphed) else "unknown"
        parts = self.parts_ms(work)
        return max(parts, key=lambda name: parts[name])


@dataclasses.dataclass(frozen=True)
class Measured:
    """A layer with the nodes in it, its work, and what limits it.

    Attributes:
        ms: of a call without a profiler, as far as the layers' times had to be scaled to it.
        work: None where it is not known.
    """

    layer: LayerTime
    nodes: tuple[ir.Node, ...]
    ms: float
    work: Work | None
    limit_ms: float | None
    bound: Bound

    def saved_ms(self, roof: Roof, work: Work, *, aligned_before: bool = True, aligned: bool = True) -> float:
        """What other work in its place would save; negative where it would take longer."""
        if self.work is None:
            return 0.0
        before = roof.limit_ms(self.work, aligned=aligned_before)
        return self.ms * (1 - roof.limit_ms(work, aligned=aligned) / before) if before > 0 else 0.0
