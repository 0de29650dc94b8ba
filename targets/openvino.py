"""OpenVINO on the CPU."""

from __future__ import annotations

import collections
import dataclasses
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..compiler.machine.environment import cores, processors
from ..errors import BuildError, EngineError, TargetUnavailableError
from ._openvino import OpenVINORunner, translated
from ._signal_stack import kept_signal_stack
from .base import Arrays, Availability, BuildRequest, Capabilities, EngineInfo, Runner, Target, Tuning
from .profile import Profile

MINIMUM = "2025.0"
INSTALL = "pip install 'enginesmith[openvino]'"
NO_BF16 = "this processor has no bfloat16 instructions"
_HINTS = {"fp32": "f32", "bf16": "bf16"}


@dataclasses.dataclass(frozen=True)
class OpenVINO(Target):
    """OpenVINO on the CPU, from its own file format, which any machine with OpenVINO loads.

    By itself OpenVINO computes in bfloat16 where the processor can; here fp32 means fp32, and bf16 is a precision of
    its own. Where weights alone are stored in 8 or 4 bits, OpenVINO quantizes activations as it runs, in groups of 32.

    Attributes:
        threads: threads that share an operator; None for OpenVINO's choice.
        hint: what OpenVINO tunes its streams for.
        pinning: whether threads stay on their cores; None for OpenVINO's choice.
        rest: what nodes that are not quantized compute in, in int8 and mixed.
    """

    threads: int | None = None
    hint: Literal["latency", "throughput"] = "latency"
    pinning: bool | None = None
    rest: Literal["fp32", "bf16"] = "fp32"

    name: ClassVar[str] = "openvino"
    summary: ClassVar[str] = "OpenVINO on the CPU"
    capabilities: ClassVar[Capabilities] = Capabilities(
        consumes="graph",
        precisions=("fp32", "bf16", "int8", "int8-weights", "int4-weights", "mixed"),
        devices=("cpu",),
        opset=(7, 21),
        channels=16,
        minimum={"openvino": MINIMUM},
    )
    lowerings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "fp32": (),
        "bf16": (),  # OpenVINO lowers at loading, and fuses more than it would around casts of ours
        "int8": ("quantize-static:scheme=openvino",),
        "int8-weights": ("quantize-weights:bits=8,scheme=tensorrt",),
        "int4-weights": ("opset:least=21", "quantize-weights:bits=4,scheme=tensorrt"),
        "mixed": ("precision:to=int8,scheme=openvino",),
    }

    def __post_init__(self) -> None:
        self.require_at_least(1, "threads")

    def availability(self) -> Availability:
        """Imports openvino and looks for its CPU plugin."""
        try:
            version = _require()
        except TargetUnavailableError as error:
            return Availability(build=False, run=False, reason=error.message, install=error.hint or "")
        return Availability(build=True, run=True, versions={"openvino": version})

    def refusals(self) -> Mapping[str, str]:
        """bfloat16 where the processor would emulate it, and types that OpenVINO has no kernels for on a CPU."""
        found = {
            "fp16": "OpenVINO computes fp16 graphs in fp32 on a CPU; bf16 is its half precision there",
            "int8-dynamic": "OpenVINO computes dynamically quantized ONNX graphs in fp32; int8 has static ranges",
        }
        if self.availability().run and not has_bf16():
            found["bf16"] = NO_BF16
        return found

    def rewrites(self, precision: str) -> tuple[str, ...]:
        """Embedding tables; attention and what is around it OpenVINO finds itself."""
        return ("fuse-embeddings",)

    def tunings(self, precision: str) -> tuple[Tuning, ...]:
        """bfloat16 around 8 bits, and threads."""
        rest = Tuning("type of what is not quantized", ({"rest": "bf16"},), "quick")
        threads = Tuning(
            "threads within an operator",
            tuple({"threads": count} for count in sorted({1, cores(), processors()})),
            "default",
        )
        pinning = Tuning("pinning of threads to cores", ({"pinning": True}, {"pinning": False}), "thorough")
        quantized = precision in ("int8", "mixed") and self.availability().run and has_bf16()
        return (*((rest,) if quantized else ()), threads, pinning)

    def build(self, request: BuildRequest) -> EngineInfo:
        """Writes the graph in OpenVINO's format, and records in which types this machine executes it."""
        import openvino

        _require()
        assert request.graph is not None
        if self.rest == "bf16" and not has_bf16():
            raise BuildError(f"option rest=bf16 of {self.name} cannot be had: {NO_BF16}", hint="leave it out")
        entry = request.directory / "model.xml"
        request.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=request.cache, prefix="openvino-") as folder:
            request.graph.save(Path(folder) / "model.onnx")
            with translated(f"OpenVINO refused {request.directory.name}", BuildError):
                model = openvino.Core().read_model(Path(folder) / "model.onnx")
                for index, spec in enumerate(request.signature.outputs):
                    model.outputs[index].get_tensor().add_names({spec.name})
                openvino.save_model(model, entry, compress_to_fp16=False)
                del model
        return self.describe(self.info(request, entry.name, {}), request)

    def built_for(self) -> Mapping[str, str]:
        """The version of OpenVINO: what is for one processor is made when the file is loaded."""
        return self.versions()

    def describe(self, info: EngineInfo, request: BuildRequest) -> EngineInfo:
        """Looks at the types in which this machine executes the file."""
        version = _require()
        with translated(f"OpenVINO failed to run {info.entry} on the sample", BuildError):
            compiled = self.compiled(request.directory / info.entry, request.precision)
            names = {name for value in compiled.inputs for name in value.get_names()}
            compiled({name: array for name, array in request.sample.items() if name in names})
            details = _examine(compiled.get_runtime_model())
        request.log(f"{details['nodes']} nodes executed: {details['executed']}")
        return dataclasses.replace(info, versions={"openvino": version}, details=details)

    def runner(self, directory: Path, info: EngineInfo) -> Runner:
        """Compiles the model for this machine."""
        _require()
        if "bf16" in (info.precision, self.rest) and not has_bf16():
            raise EngineError(f"engine {info.name!r} computes in bfloat16: {NO_BF16}", hint="compile it for fp32")
        with translated(f"OpenVINO refused {info.entry}", EngineError):
            compiled = self.compiled(directory / info.entry, info.precision)
        return OpenVINORunner(compiled, [spec.name for spec in info.signature.outputs])

    def profile(self, directory: Path, info: EngineInfo, inputs: Arrays) -> Profile | str:
        """By OpenVINO's own counters."""
        from ._openvino_profile import profile

        _require()
        with translated(f"OpenVINO failed to profile {info.entry}", EngineError):
            return profile(self.compiled(directory / info.entry, info.precision, counting=True), inputs)

    def compiled(self, path: Path, precision: str, *, counting: bool = False) -> Any:
        """The model at `path`, .xml or .onnx, compiled for this machine."""
        import openvino

        computed = "bf16" if precision == "bf16" else "fp32" if precision == "fp32" else self.rest
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": self.hint.upper(),
            "INFERENCE_PRECISION_HINT": _HINTS[computed],
        }
        if counting:
            options["PERF_COUNT"] = True
        if self.threads is not None:
            options["INFERENCE_NUM_THREADS"] = self.threads
            options["ENABLE_HYPER_THREADING"] = True  # or it takes one thread a physical core at most
        if self.pinning is not None:
            options["ENABLE_CPU_PINNING"] = self.pinning
        core = openvino.Core()
        with kept_signal_stack():
            return core.compile_model(core.read_model(path), "CPU", options)


@functools.cache
def has_bf16() -> bool:
    """Whether this processor computes in bfloat16, as OpenVINO sees it."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _require() -> str:
    """The version of OpenVINO.

    Raises:
        TargetUnavailableError: it cannot be imported, is too old, or has no CPU plugin.
    """
    try:
        import openvino
    except ImportError as error:
        raise TargetUnavailableError(f"openvino cannot be imported: {error}", hint=INSTALL) from error
    version = str(openvino.__version__).partition("-")[0]
    if tuple(map(int, version.split(".")[:2])) < tuple(map(int, MINIMUM.split("."))):
        raise TargetUnavailableError(
            f"openvino {version} is too old, {MINIMUM} or newer is needed",
            hint=f"{INSTALL.replace('install', 'install --upgrade')}",
        )
    if "CPU" not in openvino.Core().available_devices:
        raise TargetUnavailableError("openvino has no plugin for this processor", hint=INSTALL)
    return version


def _examine(model: Any) -> dict[str, Any]:
    """What the executed graph is made of.

    Returns:
        nodes: executed nodes, constants, inputs and outputs left out.
        executed: how many of each type of layer in each precision.
        reorders: changes of layout; converts: changes of type; both cost time and compute nothing.
        quantizers: FakeQuantize nodes that no neighbour took in.
    """
    kinds: collections.Counter[str] = collections.Counter()
    for node in model.get_ops():
        facts = node.get_rt_info()
        kind, precision = (_text(facts[key]) for key in ("layerType", "runtimePrecision"))
        if kind not in ("Const", "Input", "Output"):
            kinds[f"{kind} {precision}"] += 1
    return {
        "nodes": sum(kinds.values()),
        "executed": dict(kinds.most_common()),
        "reorders": _count(kinds, "Reorder"),
        "converts": _count(kinds, "Convert"),
        "quantizers": _count(kinds, "FakeQuantize"),
    }


def _text(value: Any) -> str:
    return str(value.astype(str)) if hasattr(value, "astype") else str(value)


def _count(kinds: Mapping[str, int], kind: str) -> int:
    return sum(count for name, count in kinds.items() if name.split()[0] == kind)
