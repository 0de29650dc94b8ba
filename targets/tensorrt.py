"""TensorRT."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from ..errors import RecipeError, TargetUnavailableError
from ._tunings import tf32
from .base import Arrays, Availability, BuildRequest, Capabilities, EngineInfo, Runner, Target, Tuning
from .profile import Profile
from .trt import build as trt
from .trt.precisions import ALIGNMENT, LOWERINGS, PRECISIONS, STRONGLY_TYPED, WEAK_LOWERINGS, refusals

if TYPE_CHECKING:
    from .trt.runner import SessionRunner, WorkerRunner

MODULE = "tensorrt"
_ATTENTION = (10, 14)
"""The first version whose parser takes ONNX's Attention, of opset 23."""
OLDEST, NEWEST = (8, 6), (11, 99)

INSTALL = (
    "pip install 'enginesmith[tensorrt]' (its libraries come from NVIDIA's index), or set "
    f"{trt.variable(MODULE)} to an interpreter that has tensorrt and polygraphy"
)


@dataclasses.dataclass(frozen=True)
class TensorRT(Target):
    """TensorRT 8.6 to 11 on this machine's GPU, built in a worker process. Engines are for this GPU and version only.

    Precision is what the graph says: networks are strongly typed from TensorRT 10 on; before, the builder may use the
    graph's lower types and fp32 arithmetic is pinned. In int8 and fp8 what is not quantized is in fp16.

    Attributes:
        workspace_gib: memory that tactics may use; None for all that the GPU has.
        builder_level: 0 to 5, how long to search for fast kernels.
        timing_cache: whether to keep measured tactics for the next build.
        profiles: "range" tunes for the usual sizes of the dynamic axes; "points" tunes for the smallest, usual and
            largest separately as well, at about four times the build time and memory.
        tf32: whether fp32 may compute with TF32's ten bits of mantissa.
        sparsity: whether to use kernels for 2:4 sparse weights where they are faster. None: where the graph has such
            weights.
        cuda_graph: whether to replay launches as a CUDA graph.
        aux_streams: streams beside the main one; None for TensorRT's choice.
        device_id: the GPU that the engine runs on, by CUDA's number, of the kind of the first, on which it is built.
    """

    workspace_gib: float | None = None
    builder_level: int = 3
    timing_cache: bool = True
    profiles: Literal["range", "points"] = "range"
    tf32: bool = False
    sparsity: bool | None = None
    cuda_graph: bool = True
    aux_streams: int | None = None
    device_id: int = 0

    name: ClassVar[str] = "tensorrt"
    summary: ClassVar[str] = "TensorRT on an NVIDIA GPU"
    capabilities: ClassVar[Capabilities] = Capabilities(
        consumes="graph",
        precisions=PRECISIONS,
        devices=("cuda",),
        opset=(9, 23),
        gpu_to_build=True,
        minimum={"tensorrt": "8.6"},
        sparsity=("2:4",),
        alignment=ALIGNMENT,
    )
    lowerings: ClassVar[Mapping[str, tuple[str, ...]]] = LOWERINGS

    def __post_init__(self) -> None:
        check_options(self.name, self.workspace_gib, self.builder_level, self.aux_streams)
        self.require_at_least(0, "device_id")

    def rewrites(self, precision: str) -> tuple[str, ...]:
        """ONNX's own operators alone, attention among them where the parser of the version found takes it."""
        return rewrites(precision, attention=_fuses(trt.look(MODULE)))

    def tunings(self, precision: str) -> tuple[Tuning, ...]:
        """What the builder may search, and how launches reach the GPU."""
        return (
            *tf32(precision),
            Tuning("search for kernels", ({"builder_level": 4}, {"builder_level": 5})),
            Tuning("streams beside the main one", ({"aux_streams": 0},)),
            Tuning("sizes to tune for", ({"profiles": "points"},), "thorough"),
            Tuning("launches as a CUDA graph", ({"cuda_graph": False},), "thorough"),
        )

    def opset_range(self) -> tuple[int, int] | None:
        """The opsets that the parser of the version found takes."""
        found = trt.look(MODULE)
        if _weakly_typed(found):
            return 9, 17
        return self.capabilities.opset if _fuses(found) else (9, 22)

    def lowering(self, precision: str) -> tuple[str, ...]:
        """As networks of the version found are typed."""
        return (WEAK_LOWERINGS if _weakly_typed(trt.look(MODULE)) else self.lowerings)[precision]

    def refusals(self) -> Mapping[str, str]:
        """What the version and the GPU found here do not have."""
        found = trt.look(MODULE)
        if found.version is None or found.compute_capability is None:
            return {}
        return refusals(_numbers(found.version)[0], [found.compute_capability], "build on a newer GPU")

    def availability(self) -> Availability:
        """Asks the worker's interpreter for TensorRT, the driver and the GPU."""
        found = trt.look(MODULE)
        reason, install = _why_not(found, to_build=True)
        ready = not reason
        return Availability(build=ready, run=ready, reason=reason, install=install, versions=found.versions(MODULE))

    def versions(self) -> Mapping[str, str]:
        """Asked for in this process where engines run in it."""
        return trt.look(MODULE, to_run=True).versions(MODULE)

    def built_for(self) -> Mapping[str, str]:
        """Version, GPU and platform; tactics were measured on this model of GPU."""
        found = trt.look(MODULE)
        facts = {"tensorrt": found.version, "gpu": found.gpu, "compute_capability": found.compute_capability}
        return {**{name: value or "" for name, value in facts.items()}, "platform": trt.host()}

    def build(self, request: BuildRequest) -> EngineInfo:
        """Builds for this machine's GPU, tuned over the ranges of the dynamic axes."""
        found = trt.look(MODULE)
        reason, install = _why_not(found, to_build=True)
        if reason:
            raise TargetUnavailableError(reason, hint=install)
        cache = request.cache / f"tensorrt-{found.version}-{_slug(found.gpu)}.timing" if self.timing_cache else None
        plans = trt.profiles(request.signature, self.profiles)
        weak = _weakly_typed(found)
        details = trt.build_plan(MODULE, request, plans, self.options(), cache, weakly_typed=weak)
        requires = {"tensorrt": found.release, "compute_capability": found.compute_capability or ""}
        return self.info(request, "model.plan", found.versions(MODULE), requires=requires, details=details)

    def runner(self, directory: Path, info: EngineInfo) -> Runner:
        """Opens the engine in this process where it has TensorRT, else in a worker process."""
        return self._open(directory, info)

    def profile(self, directory: Path, info: EngineInfo, inputs: Arrays) -> Profile | str:
        """By TensorRT's profiler."""
        from .trt.profile import profile

        return profile(self._open(directory, info), inputs)

    def _open(self, directory: Path, info: EngineInfo) -> SessionRunner | WorkerRunner:
        from ..compiler.machine.requirements import check_machine
        from .trt.runner import open_engine

        found = trt.look(MODULE, to_run=True)
        reason, install = _why_not(found)
        if reason:
            raise TargetUnavailableError(reason, hint=install)
        check_machine(info, self)
        plan, graph = directory / info.entry, self.cuda_graph
        return open_engine(MODULE, plan, info.signature, cuda_graph=graph, device=self.device_id)


def check_options(name: str, workspace_gib: float | None, builder_level: int, aux_streams: int | None) -> None:
    """Raises RecipeError for values outside their range."""
    if workspace_gib is not None and workspace_gib <= 0:
        raise RecipeError(f"workspace_gib of {name} is not positive", expected="above 0", found=workspace_gib)
    if not 0 <= builder_level <= 5:
        raise RecipeError(f"builder_level of {name} is out of range", expected="0 to 5", found=builder_level)
    if aux_streams is not None and aux_streams < 0:
        raise RecipeError(f"aux_streams of {name} is negative", expected="0 or more", found=aux_streams)


def rewrites(precision: str, *, attention: bool) -> tuple[str, ...]:
    """What both TensorRTs may gain by; their kernels of whole attentions are for half precision."""
    fused = ("fuse-transformer:scheme=tensorrt",) if attention and precision != "fp32" else ()
    return ("fuse-transformer:scheme=onnx", *fused, "fuse-embeddings")


def _why_not(found: trt.Found, *, to_build: bool = False) -> tuple[str, str]:
    """Why TensorRT cannot be used, and what to do; empty where it can."""
    if found.version is None:
        return f"TensorRT cannot be imported: {found.problem}", INSTALL
    if not OLDEST <= _numbers(found.version)[:2] <= NEWEST:
        return f"TensorRT {found.version} is not supported (8.6 to 11 are)", INSTALL
    if to_build and found.polygraphy is None:
        return f"Polygraphy cannot be imported beside TensorRT: {found.problem}", INSTALL
    if found.compute_capability is None:
        return found.gpu_problem or "no NVIDIA GPU", "run on a machine with an NVIDIA GPU and its driver"
    return "", ""


def _weakly_typed(found: trt.Found) -> bool:
    return found.version is not None and _numbers(found.version)[0] < STRONGLY_TYPED


def _fuses(found: trt.Found) -> bool:
    """Whether the parser takes attention as one operator; where there is no TensorRT the newest is told of."""
    return found.version is None or _numbers(found.version)[:2] >= _ATTENTION


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _slug(text: str | None) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text or "gpu")
