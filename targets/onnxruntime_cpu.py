"""ONNX Runtime on the CPU."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from ..compiler.difference import relative_l2
from ..errors import BuildError, RecipeError, TargetUnavailableError
from ._caches import Caches
from ._onnxruntime import MINIMUM, OPSET, HostRunner, Optimization, Session, examine, require_onnxruntime
from ._onnxruntime_states import StatesRunner, facts, saved
from .base import Arrays, Availability, BuildRequest, Capabilities, EngineInfo, Runner, Target, Tuning
from .profile import Profile

_SAME = 1e-6
"""Relative L2 that is allowed between the graph and what ONNX Runtime saves of it: sums in another order."""


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
        optimized_model: whether to save the graph as ONNX Runtime optimizes it, so that this is not done again whenever
            the engine is loaded; it runs on processors alike and with this version only.
        arena: whether memory of one run is kept for the next.
    """

    threads: int | None = None
    inter_threads: int = 1
    spinning: bool = True
    optimization: Optimization = "all"
    disabled_optimizers: tuple[str, ...] = ("SkipLayerNormFusion",)
    optimized_model: bool = False
    arena: bool = True

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
        if self.optimized_model and self.optimization == "none":
            raise RecipeError(
                "optimized_model=true saves a graph that optimization=none leaves as it is",
                found=str(self),
                hint="leave one of the two out",
            )

    def availability(self) -> Availability:
        """Imports onnxruntime."""
        try:
            require_onnxruntime("cpu")
        except TargetUnavailableError as error:
            return Availability(build=False, run=False, reason=error.message, install=error.hint or "")
        import onnxruntime

        return Availability(build=True, run=True, versions={"onnxruntime": onnxruntime.__version__})

    def rewrites(self, precision: str) -> tuple[str, ...]:
        """Attention, with and without a cache, and embedding tables; quantization takes what they leave."""
        return ("fuse-attention", "fuse-transformer:scheme=onnxruntime-cpu", "fuse-embeddings")

    def tunings(self, precision: str) -> tuple[Tuning, ...]:
        """Threads first; spinning and the level of optimization stay, as less was never faster."""
        from ..compiler.machine import environment

        cores, processors = environment.cores(), environment.processors()
        counts = sorted({1, max(cores // 2, 1), cores, processors} - {self.threads or cores}, reverse=True)
        threads = Tuning("threads within an operator", tuple({"threads": count} for count in counts), "quick")
        side = Tuning("operators side by side", ({"inter_threads": 2},)) if cores > 1 else None
        return (
            *((threads,) if counts else ()),
            *((side,) if side else ()),
            Tuning("sums and LayerNormalization as one node", ({"disabled_optimizers": ()},)),
            Tuning("memory kept between runs", ({"arena": False},), "thorough"),
        )

    def refusals(self) -> Mapping[str, str]:
        """bfloat16, which ONNX Runtime does not compute in on a CPU."""
        return {"bf16": "ONNX Runtime has no bfloat16 kernels for CPUs; torch-inductor computes in it"}

    def build(self, request: BuildRequest) -> EngineInfo:
        """Saves the graph, and records what ONNX Runtime makes of it on this machine."""
        require_onnxruntime("cpu")
        entry = request.directory / "model.onnx"
        request = saved(request, entry)
        info = self.describe(self.info(request, entry.name, {}), request)
        if not self.optimized_model:
            return info
        optimized = self._optimized(entry, request)
        return dataclasses.replace(info, entry=optimized.name, requires=_requires(info.versions["onnxruntime"]))

    def built_for(self) -> Mapping[str, str]:
        """An ONNX file is the same everywhere; an optimized one needs the version and a processor alike."""
        version = self.versions().get("onnxruntime", "")
        return {**_requires(version), "onnxruntime": version} if self.optimized_model else {}

    def describe(self, info: EngineInfo, request: BuildRequest) -> EngineInfo:
        """Looks at what ONNX Runtime makes of the file on this machine; an optimized one stays as it is."""
        if info.requires:
            return info
        sample = Caches.read(request.directory, info.signature).stored(request.sample)
        details = examine(request.directory / info.entry, self._session(), sample, request.cache)
        details.update(facts(request.directory / info.entry, info.signature))
        request.log(f"{details['nodes']} nodes after optimization, placed {details['placement']}")
        return dataclasses.replace(info, versions=self.versions(), details=details)

    def runner(self, directory: Path, info: EngineInfo) -> Runner:
        """Opens the session."""
        from ..compiler.machine.requirements import check_machine

        require_onnxruntime("cpu")
        check_machine(info, self)
        session = self._session(optimized=self.optimized_model).open(directory / info.entry)
        if info.details.get("in_place"):
            return StatesRunner(session, info.signature, Caches.read(directory, info.signature))
        return HostRunner(session, [spec.name for spec in info.signature.outputs])

    def profile(self, directory: Path, info: EngineInfo, inputs: Arrays) -> Profile | str:
        """By ONNX Runtime's profiler."""
        from ._onnxruntime_profile import profile

        require_onnxruntime("cpu")
        stored = Caches.read(directory, info.signature).stored(inputs)
        return profile(directory / info.entry, self._session(optimized=self.optimized_model), stored)

    def _optimized(self, entry: Path, request: BuildRequest) -> Path:
        """Puts the graph as ONNX Runtime optimizes it in the place of the one in `entry`, where it gives the same."""
        optimized = entry.with_name("optimized.onnx")
        before = self._session().open(entry, optimized=optimized)
        after = self._session(optimized=True).open(optimized)
        sample = Caches.read(request.directory, request.signature).stored(request.sample)
        feed = {value.name: sample[value.name] for value in before.get_inputs()}
        for spec, expected, found in zip(
            before.get_outputs(), before.run(None, feed), after.run(None, feed), strict=True
        ):
            if not (difference := relative_l2(found, expected)) <= _SAME:
                raise BuildError(
                    f"the graph that ONNX Runtime saves computes another {spec.name!r}",
                    expected=f"relative L2 up to {_SAME:.0e}",
                    found=f"{difference:.2e}",
                    hint="build it with optimized_model=false",
                )
        for file in (entry, entry.with_name(entry.name + ".data")):
            file.unlink(missing_ok=True)
        return optimized

    def _session(self, *, optimized: bool = False) -> Session:
        return Session(
            intra_threads=self.threads or 0,
            inter_threads=self.inter_threads,
            optimization="none" if optimized else self.optimization,
            disabled_optimizers=self.disabled_optimizers,
            entries={} if self.spinning else {"session.intra_op.allow_spinning": "0"},
            arena=self.arena,
        )


def _requires(version: str) -> dict[str, str]:
    """What must hold where layouts and kernels that were chosen here are to run."""
    from ..compiler.machine import environment

    flags = " ".join(environment.simd_flags())
    needs = {"onnxruntime": ".".join(version.split(".")[:2]), "machine": platform.machine()}
    return {**needs, **({"cpu_flags": flags} if flags else {})}
