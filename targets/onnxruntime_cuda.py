"""ONNX Runtime on an NVIDIA GPU, by its CUDA execution provider."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..errors import BuildError, EngineError, TargetUnavailableError
from ._caches import Caches
from ._onnxruntime import MINIMUM, OPSET, Optimization, Session, examine, require_onnxruntime
from ._onnxruntime_states import facts, saved
from ._tunings import tf32
from .base import Arrays, Availability, BuildRequest, Capabilities, EngineInfo, Runner, Target, Tuning
from .cuda import choosers, driver
from .cuda.decoding import CachesRunner, DecodingRunner
from .cuda.onnxruntime import DeviceRunner
from .cuda.stream import Stream
from .profile import Profile

CUDA = "CUDAExecutionProvider"
_KEEPS_STAGED = (1, 30)
"""The version of ONNX Runtime from which on a CUDA graph keeps what its operators copy from the host
(github.com/microsoft/onnxruntime/pull/32121)."""
_STAGED = frozenset(("Concat", "GRU", "LSTM", "NonMaxSuppression", "RNN", "ScatterND", "Split"))
"""Operators that copy tables from the host when they are called."""
_ARENA = {"power-of-two": "kNextPowerOfTwo", "requested": "kSameAsRequested"}


@dataclasses.dataclass(frozen=True)
class OnnxRuntimeCuda(Target):
    """ONNX Runtime on an NVIDIA GPU. Nodes that it leaves on the CPU are counted and named, never passed over.

    Attributes:
        device_id: number of the GPU, as CUDA_VISIBLE_DEVICES orders them.
        cuda_graph: whether to capture a CUDA graph for each set of input shapes when it first comes, at fixed buffers;
            CUDA lets no other thread allocate memory meanwhile. Where ONNX Runtime refuses (a node on the CPU, control
            flow), the engine is built without, and its details say why.
        prefer_nhwc: whether convolutions run in the layout that Tensor Cores take; None for "in fp16, where there are
            any": with it ONNX Runtime computes shapes on the device, and copies them to and fro.
        fuse_conv_bias: whether cuDNN adds the bias within a convolution; None for "in fp16 only".
        conv_algo_search: how cuDNN's algorithm is found; "exhaustive" times them at the first run of each shape.
        conv_workspace: whether a convolution may take all the memory that its fastest algorithm needs.
        tf32: whether fp32 products may round their factors to 10 bits; off so that fp32 means fp32.
        gelu_approximation: whether GELU by erf is computed by tanh, which differs by less than 5e-4.
        strict_layer_norm: whether SkipLayerNormalization in fp16 sums in fp32, which is slower.
        memory_limit_mib: most memory that the session's arena may take; None for all.
        arena: whether the arena grows to powers of two, or by what is asked for, which takes less and may come slower.
        optimization: which of ONNX Runtime's own graph optimizations run.
        disabled_optimizers: optimizations to leave out.
    """

    device_id: int = 0
    cuda_graph: bool = True
    prefer_nhwc: bool | None = None
    fuse_conv_bias: bool | None = None
    conv_algo_search: Literal["exhaustive", "heuristic", "default"] = "exhaustive"
    conv_workspace: bool = True
    tf32: bool = False
    gelu_approximation: bool = False
    strict_layer_norm: bool = False
    memory_limit_mib: int | None = None
    arena: Literal["power-of-two", "requested"] = "power-of-two"
    optimization: Optimization = "all"
    disabled_optimizers: tuple[str, ...] = ()

    name: ClassVar[str] = "onnxruntime-cuda"
    summary: ClassVar[str] = "ONNX Runtime on an NVIDIA GPU"
    capabilities: ClassVar[Capabilities] = Capabilities(
        consumes="graph",
        precisions=("fp32", "fp16", "bf16", "int4-weights", "mixed-fp16", "mixed-bf16"),
        devices=("cuda",),
        opset=OPSET,
        gpu_to_build=True,
        minimum={"onnxruntime-gpu": MINIMUM},
        alignment=dict.fromkeys(("fp16", "bf16", "int4-weights", "mixed-fp16", "mixed-bf16"), 8),
    )
    # bf16 stays below opset 22, where Conv would become bfloat16, and pooling too, which has no such CUDA kernel.
    lowerings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **Target.lowerings,
        "int4-weights": ("quantize-weights:bits=4", "cast:to=fp16"),
        "mixed-fp16": ("precision:to=fp16",),
        "mixed-bf16": ("precision:to=bf16",),
    }

    def __post_init__(self) -> None:
        self.require_at_least(0, "device_id")
        self.require_at_least(1, "memory_limit_mib")

    def availability(self) -> Availability:
        """Looks for onnxruntime-gpu, the driver, the device, and the libraries of CUDA and cuDNN."""
        try:
            versions = self._require()
        except TargetUnavailableError as error:
            return Availability(build=False, run=False, reason=error.message, install=error.hint or "")
        return Availability(build=True, run=True, versions=versions)

    def rewrites(self, precision: str) -> tuple[str, ...]:
        """Attention, over caches in the precision that has kernels for it, what is around it, and embedding tables."""
        cached = ("fuse-attention:scheme=onnxruntime-cuda",) if precision in ("fp16", "int4-weights") else ()
        return (*cached, "fuse-transformer:scheme=onnxruntime-cuda", "fuse-embeddings")

    def tunings(self, precision: str) -> tuple[Tuning, ...]:
        """How convolutions and products are computed, and how launches and memory reach the GPU."""
        now = self._convolutions(precision)
        both = {"prefer_nhwc": True, "fuse_conv_bias": True}
        others = tuple({**now, name: not value} for name, value in now.items())
        layouts = others if now == both else (both, *(other for other in others if other != both))
        return (
            *tf32(precision),
            Tuning("layout of convolutions", layouts, "quick"),
            Tuning("search for algorithms of convolutions", ({"conv_algo_search": "heuristic"},)),
            Tuning("GELU by tanh", ({"gelu_approximation": True},)),
            Tuning("launches as a CUDA graph", ({"cuda_graph": not self.cuda_graph},), "thorough"),
            Tuning("growth of the arena", ({"arena": "requested"},), "thorough"),
        )

    def refusals(self) -> Mapping[str, str]:
        """Quantized arithmetic, for which the CUDA provider has no kernels."""
        reason = (
            "ONNX Runtime has no {} kernels for NVIDIA GPUs: the graph would run dequantized, slower than in fp16; "
            "build it with target tensorrt"
        )
        return {"int8": reason.format("INT8"), "fp8": reason.format("FP8"), "int8-dynamic": reason.format("INT8")}

    def build(self, request: BuildRequest) -> EngineInfo:
        """Saves the graph, and records on which device each node ran and whether a CUDA graph could be captured."""
        self._require()
        assert request.graph is not None
        entry = request.directory / "model.onnx"
        request = saved(request, entry)
        if request.signature.states:
            choosers.write(request.directory, request.signature)
        return self.describe(self.info(request, entry.name, {}), request)

    def built_for(self) -> Mapping[str, str]:
        """An ONNX file is the same everywhere."""
        return {}

    def describe(self, info: EngineInfo, request: BuildRequest) -> EngineInfo:
        """Looks at what ONNX Runtime makes of the file on this machine's GPU."""
        versions, entry = self._require(), request.directory / info.entry
        options = self._provider_options(request.precision, convolves=_convolves(entry))
        sample = Caches.read(request.directory, info.signature).stored(request.sample)
        details = examine(entry, self._session(options), sample, request.cache)
        details.update(facts(entry, info.signature))
        request.log(f"{details['nodes']} nodes after optimization, placed {details['placement']}")
        if CUDA not in details["placement"]:
            raise BuildError(f"no node of {entry.name} runs on {CUDA}", expected=CUDA, found=details["placement"])
        details["provider_options"] = options
        info = dataclasses.replace(info, versions=versions, details=details)
        refusal = self._graph_refusal(request, info)
        request.log(f"CUDA graph: {refusal or 'captured'}")
        graph = {"used": not refusal, "reason": refusal}
        return dataclasses.replace(info, details={**info.details, "cuda_graph": graph})

    def runner(self, directory: Path, info: EngineInfo) -> Runner:
        """Opens the session, with a CUDA graph where the build could capture one and the version here keeps one."""
        here = dataclasses.replace(info, versions=self._require())
        return self._open(directory, info, graph=info.details["cuda_graph"]["used"] and not _staged(here))

    def profile(self, directory: Path, info: EngineInfo, inputs: Arrays) -> Profile | str:
        """By ONNX Runtime's profiler, in a process whose launches block."""
        from .cuda.profiler import profile

        self._require()
        return profile(directory, info, Caches.read(directory, info.signature).stored(inputs))

    def session(self, info: EngineInfo) -> Session:
        """The session of an engine without a CUDA graph, with CUDA's libraries loaded."""
        self._require()
        return self._session(info.details["provider_options"])

    def _open(self, directory: Path, info: EngineInfo, *, graph: bool) -> DeviceRunner:
        stream = Stream(self.device_id)
        options = {"user_compute_stream": str(stream.handle), "enable_cuda_graph": str(int(graph))}
        settings = self._session({**info.details["provider_options"], **options})
        try:
            session = settings.open(directory / info.entry)
        except EngineError:
            stream.close()
            raise
        signature, fused = info.signature, "GroupQueryAttention" in info.details["operators"]
        if not info.details.get("in_place"):
            return DeviceRunner(session, stream, [spec.name for spec in signature.outputs], graphs=graph)
        caches = Caches.read(directory, signature)
        if info.details["memcpy"]:
            return CachesRunner(session, stream, signature, caches, fused=fused, graphs=graph)
        open_chooser = functools.partial(_opened, settings, directory)
        return DecodingRunner(session, stream, signature, caches, open_chooser, fused=fused, graphs=graph)

    def _graph_refusal(self, request: BuildRequest, info: EngineInfo) -> str:
        """Why the engine runs without a CUDA graph; empty where one was captured and replayed."""
        if not self.cuda_graph:
            return "turned off by cuda_graph=false"
        if staged := _staged(info):
            return staged
        try:
            runner = self._open(request.directory, info, graph=True)
        except EngineError as error:
            return f"{error.message}; on the CPU: {info.details['on_cpu'] or 'nothing'}"
        try:
            for _ in range(2):  # the first captures, the second replays
                runner.run(request.sample)
        except EngineError as error:
            return error.message
        finally:
            runner.close()
        return ""

    def _session(self, provider_options: Mapping[str, str]) -> Session:
        return Session(
            provider=CUDA,
            provider_options=provider_options,
            optimization=self.optimization,
            disabled_optimizers=self.disabled_optimizers,
            entries={"optimization.enable_gelu_approximation": "1"} if self.gelu_approximation else {},
        )

    def _convolutions(self, precision: str, *, convolves: bool = True) -> dict[str, bool]:
        """How convolutions are computed, with what is left open decided."""
        half = convolves and precision == "fp16"
        chosen = {"prefer_nhwc": self.prefer_nhwc, "fuse_conv_bias": self.fuse_conv_bias}
        return {name: half if value is None else value for name, value in chosen.items()}

    def _provider_options(self, precision: str, *, convolves: bool) -> dict[str, str]:
        options: dict[str, Any] = {
            "device_id": self.device_id,
            **{name: int(value) for name, value in self._convolutions(precision, convolves=convolves).items()},
            "cudnn_conv_algo_search": self.conv_algo_search.upper(),
            "cudnn_conv_use_max_workspace": int(self.conv_workspace),
            "use_tf32": int(self.tf32),
            "enable_skip_layer_norm_strict_mode": int(self.strict_layer_norm),
            "arena_extend_strategy": _ARENA[self.arena],
        }
        if self.memory_limit_mib is not None:
            options["gpu_mem_limit"] = self.memory_limit_mib << 20
        return {key: str(value) for key, value in options.items()}

    def _require(self) -> dict[str, str]:
        """Versions of what was found.

        Raises:
            TargetUnavailableError: the first thing that is missing.
        """
        require_onnxruntime("cuda")
        import onnxruntime

        if CUDA not in (providers := onnxruntime.get_available_providers()):
            raise TargetUnavailableError(
                f"onnxruntime {onnxruntime.__version__} was built without {CUDA}, it has {', '.join(providers)}",
                hint="onnxruntime and onnxruntime-gpu exclude each other: "
                "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'enginesmith[cuda]'",
            )
        if reason := driver.problem():
            raise TargetUnavailableError(reason, hint="install NVIDIA's driver; start a container with --gpus all")
        if self.device_id >= (count := driver.count()):
            raise TargetUnavailableError(f"there is no GPU {self.device_id}", expected=f"less than {count}")
        if missing := _preload():
            raise TargetUnavailableError(
                f"onnxruntime {onnxruntime.__version__} cannot load {missing}",
                hint=f"install CUDA {_cuda_major()} and cuDNN 9, for instance with torch for CUDA {_cuda_major()}",
            )
        return {
            "onnxruntime": onnxruntime.__version__,
            "cuda": onnxruntime.cuda_version,
            "driver_supports": driver.driver_version(),
        }


def _staged(info: EngineInfo) -> str:
    """Why replays would read memory that other calls have taken since; empty where they do not."""
    found = sorted(_STAGED & info.details["operators"].keys())
    if not found or tuple(map(int, info.versions["onnxruntime"].split(".")[:2])) >= _KEEPS_STAGED:
        return ""
    least = ".".join(map(str, _KEEPS_STAGED))
    return f"replays of {', '.join(found)} read what later calls write, before onnxruntime {least}"


def _opened(settings: Session, directory: Path, file: str) -> Any:
    return settings.open(directory / file)


def _convolves(entry: Path) -> bool:
    """Whether a graph has convolutions."""
    import onnx

    nodes = onnx.load(entry, load_external_data=False).graph.node
    return any(node.op_type in ("Conv", "ConvTranspose") for node in nodes)


def _cuda_major() -> str:
    import onnxruntime

    return str(onnxruntime.cuda_version).partition(".")[0]


@functools.cache
def _preload() -> str:
    """Loads CUDA's libraries, which the first session would not look for in Python packages.

    Returns:
        The first library that cannot be loaded and why; empty where all could.
    """
    import onnxruntime

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        onnxruntime.preload_dlls()
    if not sys.platform.startswith("linux"):
        return ""
    major = _cuda_major()
    names = [f"lib{name}.so.{major}" for name in ("cudart", "cublasLt", "cublas")] + ["libcudnn.so.9"]
    return next(filter(None, (_load_library(name, sys.path) for name in names)), "")


def _load_library(name: str, folders: Sequence[str]) -> str:
    """Loads a library by name or from NVIDIA's packages; returns why it could not be, empty where it could."""
    packaged = (str(file) for folder in folders for file in Path(folder).glob(f"nvidia/*/lib/{name}"))
    reasons = [_load_failure(name)]
    reasons.extend(_load_failure(file) for file in packaged if all(reasons))
    return reasons[0] if all(reasons) else ""


def _load_failure(file: str) -> str:
    try:
        ctypes.CDLL(file)
    except OSError as error:
        return str(error)
    return ""
