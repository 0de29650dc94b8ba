"""TensorRT-RTX, which builds engines without a GPU."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..errors import RecipeError, TargetUnavailableError
from ._tunings import tf32
from .base import Arrays, Availability, BuildRequest, Capabilities, EngineInfo, Runner, Target, Tuning
from .profile import Profile
from .tensorrt import check_options, rewrites
from .trt import build as trt
from .trt.precisions import ALIGNMENT, LOWERINGS, PRECISIONS, refusals

if TYPE_CHECKING:
    from .trt.runner import SessionRunner, WorkerRunner

MODULE = "tensorrt_rtx"
COMPUTE_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")

INSTALL = f"pip install 'enginesmith[tensorrt-rtx]', or set {trt.variable(MODULE)} to an interpreter that has it"


@dataclasses.dataclass(frozen=True)
class TensorRTRTX(Target):
    """TensorRT-RTX for NVIDIA's GeForce and workstation GPUs. It builds anywhere, without a GPU or a driver.

    An engine holds kernels for the GPUs that it was built for; the rest is compiled on first use on the GPU and kept in
    a runtime cache. Networks are strongly typed: precision is what the graph says.

    Attributes:
        compute_capabilities: of the GPUs to build for, for instance ``8.6+8.9``. Hopper (9.0) is not among those that
            TensorRT-RTX knows, and 7.5 takes no matrix products in fp32.
        workspace_gib: memory that tactics may use; None for all that the GPU has.
        builder_level: 0 to 5, how long to search for fast kernels.
        tf32: whether fp32 may compute with TF32's ten bits of mantissa.
        sparsity: whether to use kernels for 2:4 sparse weights where they are faster. None: where the graph has such
            weights.
        cuda_graph: whether to replay launches as a CUDA graph.
        runtime_cache: whether to keep kernels compiled on first use, in the user's cache folder.
    """

    compute_capabilities: tuple[str, ...] = ("8.0", "8.6", "8.9", "12.0")
    workspace_gib: float | None = None
    builder_level: int = 3
    tf32: bool = False
    sparsity: bool | None = None
    cuda_graph: bool = True
    runtime_cache: bool = True

    name: ClassVar[str] = "tensorrt-rtx"
    summary: ClassVar[str] = "TensorRT-RTX on an NVIDIA RTX GPU, built without one"
    capabilities: ClassVar[Capabilities] = Capabilities(
        consumes="graph",
        precisions=PRECISIONS,
        devices=("cuda",),
        opset=(9, 23),
        minimum={"tensorrt-rtx": "1.4"},
        sparsity=("2:4",),
        alignment=ALIGNMENT,
    )
    lowerings: ClassVar[Mapping[str, tuple[str, ...]]] = LOWERINGS

    def __post_init__(self) -> None:
        check_options(self.name, self.workspace_gib, self.builder_level, None)
        unknown = [item for item in self.compute_capabilities if item not in COMPUTE_CAPABILITIES]
        if unknown or not self.compute_capabilities:
            raise RecipeError(
                f"compute_capabilities of {self.name} names no GPU that it builds for",
                expected="some of " + ", ".join(COMPUTE_CAPABILITIES),
                found="+".join(unknown) or "none",
            )

    def rewrites(self, precision: str) -> tuple[str, ...]:
        """ONNX's own operators alone, which the parser takes."""
        return rewrites(precision, attention=True)

    def tunings(self, precision: str) -> tuple[Tuning, ...]:
        """As for TensorRT, but for what only that has."""
        return (
            *tf32(precision),
            Tuning("search for kernels", ({"builder_level": 5},)),
            Tuning("launches as a CUDA graph", ({"cuda_graph": False},), "thorough"),
        )

    def refusals(self) -> Mapping[str, str]:
        """What some of the GPUs chosen do not have."""
        return refusals(None, self.compute_capabilities, "leave it out of compute_capabilities")

    def availability(self) -> Availability:
        """Asks the worker's interpreter for TensorRT-RTX, the driver and the GPU."""
        found = trt.look(MODULE)
        builds = found.version is not None and found.polygraphy is not None
        reason, to_do = _why_no_run(found)
        if not builds:
            reason, to_do = f"TensorRT-RTX cannot be imported: {found.problem}", INSTALL
        versions = found.versions(MODULE)
        return Availability(build=builds, run=not reason, reason=reason, install=to_do, versions=versions)

    def versions(self) -> Mapping[str, str]:
        """Asked for in this process where engines run in it."""
        return trt.look(MODULE, to_run=True).versions(MODULE)

    def built_for(self) -> Mapping[str, str]:
        """The version alone: engines are for the GPUs chosen, and for Linux and Windows alike."""
        return {"tensorrt_rtx": trt.look(MODULE).version or ""}

    def build(self, request: BuildRequest) -> EngineInfo:
        """Builds for the GPUs chosen, whatever this machine has."""
        found = trt.look(MODULE)
        if found.version is None or found.polygraphy is None:
            raise TargetUnavailableError(f"TensorRT-RTX cannot be imported: {found.problem}", hint=INSTALL)
        plans = trt.profiles(request.signature, "range")
        details = trt.build_plan(MODULE, request, plans, self.options(), None)  # a timing cache needs a GPU
        requires = {"tensorrt_rtx": found.release, "compute_capability": ",".join(self.compute_capabilities)}
        return self.info(request, "model.plan", found.versions(MODULE), requires=requires, details=details)

    def runner(self, directory: Path, info: EngineInfo) -> Runner:
        """Opens the engine in this process where it has TensorRT-RTX, else in a worker process."""
        return self._open(directory, info)

    def profile(self, directory: Path, info: EngineInfo, inputs: Arrays) -> Profile | str:
        """By TensorRT's profiler."""
        from .trt.profile import profile

        return profile(self._open(directory, info), inputs)

    def _open(self, directory: Path, info: EngineInfo) -> SessionRunner | WorkerRunner:
        from ..compiler.machine.requirements import check_machine
        from .trt.runner import open_engine

        found = trt.look(MODULE, to_run=True)
        reason, to_do = _why_no_run(found)
        if reason:
            raise TargetUnavailableError(reason, hint=to_do)
        check_machine(info, self)
        plan = directory / info.entry
        cache = _runtime_cache(plan, found) if self.runtime_cache else None
        return open_engine(MODULE, plan, info.signature, cuda_graph=self.cuda_graph, runtime_cache=cache)


def _why_no_run(found: trt.Found) -> tuple[str, str]:
    if found.version is None:
        return f"TensorRT-RTX cannot be imported: {found.problem}", INSTALL
    if found.compute_capability is None:
        return found.gpu_problem or "no NVIDIA GPU", "engines are built here, and run on a machine with an RTX GPU"
    if found.compute_capability not in COMPUTE_CAPABILITIES:
        return (
            f"TensorRT-RTX does not know compute capability {found.compute_capability} ({found.gpu})",
            "use the target tensorrt on this GPU",
        )
    return "", ""


def _runtime_cache(plan: Path, found: trt.Found) -> Path | None:
    """Where kernels compiled for this engine, version and GPU are kept; None where nothing can be written."""
    from ..compiler.storage.cache import Cache

    key = hashlib.sha256(plan.read_bytes() + f"{found.version} {found.gpu}".encode()).hexdigest()[:32]
    folder = Cache().root / "tensorrt-rtx"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder / f"{key}.cache"
