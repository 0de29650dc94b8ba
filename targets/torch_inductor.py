"""TorchInductor ahead of time: the exported module compiled to a library in a .pt2 package."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import BuildError, RecipeError
from ._torch import MINIMUM_TEXT, TorchRunner, check, prepare, require, tensors_of, torch_availability
from .base import Availability, BuildRequest, Capabilities, EngineInfo, Runner, Target

if TYPE_CHECKING:
    import torch

SIMD = re.compile(r"avx|amx|fma|f16c|sse|bmi|asimd|sve")


@dataclasses.dataclass(frozen=True)
class TorchInductor(Target):
    """A library that TorchInductor compiles for this very processor or GPU, and that torch of the same version loads.

    fp16 holds and computes everything in half precision, with casts where inputs and outputs have other dtypes.

    Attributes:
        device: where the engine runs.
        freezing: whether weights become constants in layouts of the compiler's choice. Without it a CNN was slower than
            eager torch (0.86x), with it faster (1.5x). Left out for models with state.
        max_autotune: whether kernels are chosen by measuring, which takes minutes.
        threads: number of threads compiled in; None for as many as torch uses when it runs.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    freezing: bool = True
    max_autotune: bool = False
    threads: int | None = None

    name: ClassVar[str] = "torch-inductor"
    summary: ClassVar[str] = "torch.export and TorchInductor, ahead of time"
    capabilities: ClassVar[Capabilities] = Capabilities(
        consumes="module", precisions=("fp32", "fp16"), devices=("cpu", "cuda"), minimum={"torch": MINIMUM_TEXT}
    )

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise RecipeError(f"threads of {self.name} is too small", expected="1 or more", found=self.threads)

    def availability(self) -> Availability:
        """Imports torch and looks for the device and for the C++ compiler, which only building needs."""
        state = torch_availability(self.device)
        compiler = os.environ.get("CXX", "g++")
        if not state.build or shutil.which(compiler):
            return state
        return dataclasses.replace(
            state, build=False, reason=f"no C++ compiler {compiler!r}", install="apt-get install g++, or set CXX"
        )

    def build(self, request: BuildRequest) -> EngineInfo:
        """Exports, compiles and packages the module, loads it again and compares it with the model."""
        require(state := self.availability(), to_build=True)
        module = prepare(request, self.device)
        if any(_is_script(part) for part in module.modules()):
            raise BuildError("torch.export does not take TorchScript", hint="build this model with target torchscript")
        entry = request.directory / "model.pt2"
        self._compile(module, request, entry)
        info = EngineInfo(
            name=request.directory.name,
            target=self.name,
            precision=request.precision,
            entry=entry.name,
            signature=request.signature,
            options=self.options(),
            versions=state.versions,
            requires=self._requires(state.versions["torch"]),
            stateful=request.model.stateful,
        )
        check(self.runner(request.directory, info), request, "compiled")
        return info

    def runner(self, directory: Path, info: EngineInfo) -> Runner:
        """Loads the package; its calls are checked, for compiled code reads beyond inputs that are too small."""
        require(self.availability())
        return _CheckedRunner(lambda: self._load(directory / info.entry), info, self.device)

    def _load(self, path: Path) -> Any:
        import torch

        return torch._inductor.aoti_load_package(str(path))

    def _compile(self, module: torch.nn.Module, request: BuildRequest, entry: Path) -> None:
        import torch
        from torch._inductor.utils import fresh_cache

        from ..compiler.reference import resized
        from ..compiler.sources.guard import first_line, foreign, quiet

        def failed(error: BaseException) -> BuildError:
            return BuildError(f"TorchInductor failed at {stage}", found=first_line(error), hint="see build.log")

        # torch.export takes a size of 1 for a constant.
        sizes = {name: min(max(size, 2), request.signature.axes[name].max) for name, size in _sizes(request).items()}
        inputs = tuple(tensors_of(resized(request.signature, request.sample, sizes), request, self.device))
        request.cache.mkdir(parents=True, exist_ok=True)
        configs: dict[str, Any] = {
            "freezing": self.freezing and not request.model.stateful,
            "max_autotune": self.max_autotune,
            "cpp.threads": self.threads or -1,
            "cpp.dynamic_threads": self.threads is None,
        }
        stage = "torch.export"
        # fresh_cache alone keeps its folder where compilation fails.
        with (
            tempfile.TemporaryDirectory(dir=request.cache, prefix="inductor-") as scratch,
            torch.no_grad(),
            quiet(request.log),
            foreign(failed),
            fresh_cache(dir=scratch),
        ):
            request.progress(0.1, stage)
            program = torch.export.export(module, inputs, dynamic_shapes=(_dynamic_shapes(request),), strict=False)
            stage = "compilation"
            request.progress(0.3, stage)
            torch._inductor.aoti_compile_and_package(program, package_path=str(entry), inductor_configs=configs)

    def _requires(self, version: str) -> dict[str, str]:
        from ..compiler import environment

        needs = {"torch": ".".join(version.split(".")[:2]), "machine": platform.machine()}
        if self.device == "cuda":
            return {**needs, "compute_capability": environment.compute_capability() or ""}
        flags = sorted(flag for flag in environment.cpu_flags() if SIMD.match(flag))
        return {**needs, **({"cpu_flags": " ".join(flags)} if flags else {})}


class _CheckedRunner(TorchRunner):
    def run(self, inputs: Any) -> dict[str, Any]:
        self._info.signature.check(inputs)
        return super().run(inputs)

    def bind(self, inputs: Any) -> Any:
        self._info.signature.check(inputs)
        return super().bind(inputs)


def _sizes(request: BuildRequest) -> dict[str, int]:
    return request.signature.check(request.sample)


def _dynamic_shapes(request: BuildRequest) -> tuple[dict[int, Any], ...]:
    """A `torch.export.Dim` for each axis with a range, the same one wherever the axis stands."""
    from torch.export import Dim

    axes = request.signature.axes
    dims = {
        name: Dim(re.sub(r"\W", "_", f"axis_{name}"), min=axis.min, max=axis.max)
        for name, axis in axes.items()
        if axis.min < axis.max
    }
    return tuple(
        {axis: dims[dim] for axis, dim in enumerate(spec.shape) if isinstance(dim, str) and dim in dims}
        for spec in request.signature.inputs
    )


def _is_script(module: torch.nn.Module) -> bool:
    import torch

    return isinstance(module, torch.jit.ScriptModule)
