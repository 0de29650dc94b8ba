"""ONNX Runtime on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from ..errors import TargetUnavailableError
from ._onnxruntime import MINIMUM, OPSET, HostRunner, Optimization, Session, examine, require_onnxruntime
from .base import Availability, BuildRequest, Capabilities, EngineInfo, Runner, Target


@dataclasses.dataclass(frozen=True)
class OnnxRuntimeCpu(Target):
    """ONNX Runtime on the CPU. fp16 is stored as such and computed in fp32, through casts that ONNX Runtime adds.

    Attributes:
        threads: threads that share an operator; None for one a physical core.
        inter_threads: operators that run side by side, for models with many independent branches.
        spinning: whether idle threads wait busily. Off frees the cores for others, at 1.8 times the latency on models
            of many small operators (LSTM).
        optimization: which of ONNX Runtime's own graph optimizations run; "all" chooses layouts for this processor.
        disabled_optimizers: optimizations to leave out, joined by ``+``. The one that is left out by default fuses Add
            and LayerNormalization to a node that takes longer than the two.
    """

    threads: int | None = None
    inter_threads: int = 1
    spinning: bool = True
    optimization: Optimization = "all"
    disabled_optimizers: tuple[str, ...] = ("SkipLayerNormFusion",)

    name: ClassVar[str] = "onnxruntime-cpu"
    summary: ClassVar[str] = "ONNX Runtime on the CPU"
    capabilities: ClassVar[Capabilities] = Capabilities(
        consumes="graph",
        precisions=("fp32", "fp16", "int8", "int8-dynamic", "int8-weights", "int4-weights", "mixed"),
        devices=("cpu",),
        opset=OPSET,
        channels=16,  # the block of its NCHWc convolutions with AVX-512
        minimum={"onnxruntime": MINIMUM},
    )
    lowerings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "fp32": (),
        "fp16": ("cast:to=fp16",),
        "int8": ("quantize-static:scheme=onnxruntime",),
        "int8-dynamic": ("quantize-dynamic",),
        "int8-weights": ("quantize-weights:bits=8",),
        "int4-weights": ("quantize-weights:bits=4",),
        "mixed": ("precision:to=int8,scheme=onnxruntime",),
    }

    def __post_init__(self) -> None:
        self.require_at_least(1, "threads", "inter_threads")

    def availability(self) -> Availability:
        """Imports onnxruntime."""
        try:
            require_onnxruntime("cpu")
        except TargetUnavailableError as error:
            return Availability(build=False, run=False, reason=error.message, install=error.hint or "")
        import onnxruntime

        return Availability(build=True, run=True, versions={"onnxruntime": onnxruntime.__version__})

    def refusals(self) -> Mapping[str, str]:
        """bfloat16, which ONNX Runtime does not compute in on a CPU."""
        return {"bf16": "ONNX Runtime has no bfloat16 kernels for CPUs; torch-inductor computes in it"}

    def build(self, request: BuildRequest) -> EngineInfo:
        """Saves the graph, and records what ONNX Runtime makes of it on this machine."""
        require_onnxruntime("cpu")
        assert request.graph is not None
        entry = request.directory / "model.onnx"
        request.graph.save(entry)
        details = examine(entry, self._session(), request.sample, request.cache)
        request.log(f"{details['nodes']} nodes after optimization, placed {details['placement']}")
        return self.info(request, entry.name, self.versions(), details=details)

    def runner(self, directory: Path, info: EngineInfo) -> Runner:
        """Opens the session."""
        require_onnxruntime("cpu")
        session = self._session().open(directory / info.entry)
        return HostRunner(session, [spec.name for spec in info.signature.outputs])

    def _session(self) -> Session:
        return Session(
            intra_threads=self.threads or 0,
            inter_threads=self.inter_threads,
            optimization=self.optimization,
            disabled_optimizers=self.disabled_optimizers,
            entries={} if self.spinning else {"session.intra_op.allow_spinning": "0"},
        )
