"""TorchInductor ahead of time: the exported module compiled to a library in a .pt2 package."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from ..errors import BuildError, EngineError, RecipeError
from ._caches import facts
from ._torch import MINIMUM_TEXT, check, dynamic_shapes, prepare, require, tensors_of, torch_availability
from ._worker import Worker
from .base import Arrays, Availability, BuildRequest, Capabilities, EngineInfo, Runner, Target, Tuning
from .inductor.worker import command, load_arrays, save_arrays
from .profile import Profile

if TYPE_CHECKING:
    import torch


_FP8_CAPABILITY = "8.9"
_CORES_FOR_ONE = 4
"""Cores that one of several programs is compiled on; those that share a process share what headers were compiled to."""


@dataclasses.dataclass(frozen=True)
class TorchInductor(Target):
    """A library that TorchInductor compiles for this very processor or GPU, and that torch of the same version loads.

    fp16 and bf16 hold and compute everything in that type, with casts where inputs and outputs have other dtypes. On a
    processor with bfloat16 instructions bf16 is about twice as fast as fp32. fp8 is for GPUs: linear layers multiply in
    FP8 (E4M3) with ranges from calibration, all else is fp16. A decoder becomes programs that write into its caches;
    see docs/generation.md.

    Attributes:
        device: where the engine runs.
        freezing: whether weights become constants in layouts of the compiler's choice. Without it a CNN was slower than
            eager torch (0.86x), with it faster (1.5x). Left out for models with state, for decoders and on a GPU.
        max_autotune: whether kernels are chosen by measuring, which takes minutes.
        cuda_graph: whether calls on a GPU are captured as a CUDA graph for each set of input shapes when it first
            comes, at buffers of its own; 8 sets at most. Left out for models with state, and where a call waits for
            the GPU.
        coordinate_descent: whether the sizes of blocks in kernels for a GPU are searched by measuring too.
        threads: number of threads compiled in; None for as many as torch uses when it runs.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    freezing: bool = True
    max_autotune: bool = False
    coordinate_descent: bool = False
    cuda_graph: bool = True
    threads: int | None = None

    name: ClassVar[str] = "torch-inductor"
    summary: ClassVar[str] = "torch.export and TorchInductor, ahead of time"
    capabilities: ClassVar[Capabilities] = Capabilities(
        consumes="module",
        precisions=("fp32", "fp16", "bf16", "fp8"),
        devices=("cpu", "cuda"),
        minimum={"torch": MINIMUM_TEXT},
        calibrated=("fp8",),
    )

    def __post_init__(self) -> None:
        self.require_at_least(1, "threads")
        if self.coordinate_descent and self.device == "cpu":
            raise RecipeError(
                "coordinate_descent=true searches kernels for a GPU", found=str(self), hint="add device=cuda"
            )

    def refusals(self) -> Mapping[str, str]:
        """FP8 where there are no kernels for it."""
        from ..compiler.machine import environment

        if self.device == "cpu":
            return {"fp8": "torch multiplies FP8 on a CPU without kernels for it; add device=cuda"}
        found = environment.compute_capability() or _FP8_CAPABILITY
        if tuple(map(int, found.split("."))) >= tuple(map(int, _FP8_CAPABILITY.split("."))):
            return {}
        reason = f"FP8 needs compute capability {_FP8_CAPABILITY} or higher, not {found}; build on a newer GPU"
        return {"fp8": reason}

    def tunings(self, precision: str) -> tuple[Tuning, ...]:
        """Kernels chosen by measuring; CUDA graphs on a GPU, threads on a CPU."""
        from ..compiler.machine import environment

        if self.device == "cuda":
            both = {"max_autotune": True, "coordinate_descent": True}
            return (
                Tuning("kernels chosen by measuring", ({"max_autotune": True},)),
                Tuning("blocks of kernels chosen by measuring", (both,), "thorough"),
                Tuning("launches as a CUDA graph", ({"cuda_graph": not self.cuda_graph},), "thorough"),
            )
        return (
            Tuning("kernels chosen by measuring", ({"max_autotune": True},)),
            Tuning("number of threads compiled in", ({"threads": environment.cores()},)),
            Tuning("weights as constants", ({"freezing": False},), "thorough"),
        )

    def availability(self) -> Availability:
        """Imports torch and looks for the device, and for what building alone needs: a C++ compiler, Triton, CUDA."""
        state = torch_availability(self.device)
        missing = _missing_tool(self.device) if state.build else None
        if missing is None:
            return state
        reason, install = missing
        return dataclasses.replace(state, build=False, reason=reason, install=install)

    def built_for(self) -> Mapping[str, str]:
        """The version of torch, the system's libraries, and the processor with its cores, or the GPU."""
        from ..compiler.machine import environment

        version = self.versions().get("torch", "")
        here = environment.environment()
        kernels = [gpu["name"] for gpu in environment.gpus()[:1]] if self.device == "cuda" else here["cpu"]
        return {**self._requires(version), "torch": version, "os": here["os"], "kernels": json.dumps(kernels)}

    def build(self, request: BuildRequest) -> EngineInfo:
        """Exports the module; a worker process compiles and packages it, loads it and runs it against the model.

        Compiler and compiled code are native: the first load of a package is where a bad one crashes. A decoder becomes
        several programs with the same weights, compiled in as many processes as there are cores for.
        """
        require(state := self.availability(), to_build=True)
        if request.precision == "fp8":
            _check_fp8(request)
        entry, signature, details = "model.pt2", request.signature, {}
        if _in_place(request):
            from .inductor.decoders import ANY, stored

            entry, signature = f"{ANY}.pt2", stored(signature, request.precision)
            details = facts(signature, in_place=True)
        requires = self._requires(state.versions["torch"])
        info = self.info(
            dataclasses.replace(request, signature=signature), entry, state.versions, requires=requires,
            stateful=request.model.stateful, details=details,
        )  # fmt: skip
        request.cache.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=request.cache, prefix="inductor-") as scratch:
                info = self._build(request, info, Path(scratch).absolute())
        except EngineError:
            for file in (*request.directory.glob("*.pt2"), *request.directory.glob("*.safetensors")):
                file.unlink()
            raise
        request.progress(1.0, "done")
        return info

    def runner(self, directory: Path, info: EngineInfo) -> Runner:
        """Loads the package; its calls are checked, for compiled code reads beyond inputs that are too small."""
        require(self.availability())
        if info.details.get("in_place"):
            from .inductor.decoding import DecodingRunner

            return DecodingRunner(directory, info, self.device)
        from .inductor.runners import CheckedRunner, ReplayRunner

        replays = self._replays(info)
        made = ReplayRunner if replays else CheckedRunner
        return made(lambda: self._load(directory / info.entry, single_threaded=replays), info, self.device)

    def profile(self, directory: Path, info: EngineInfo, inputs: Arrays) -> Profile | str:
        """By torch's profiler, which sees the operators that compiled code calls, and not the loops between."""
        from ._torch_profile import profile_runner

        one_by_one = dataclasses.replace(self, cuda_graph=False)
        return profile_runner(one_by_one.runner(directory, info), inputs, self.device, info.precision)

    def _replays(self, info: EngineInfo) -> bool:
        """Whether calls become CUDA graphs."""
        found = info.details.get("cuda_graph", {"used": self.device == "cuda"})
        return self.cuda_graph and not info.stateful and bool(found["used"])

    def _load(self, path: Path, *, single_threaded: bool) -> Any:
        import torch

        from .inductor.package import Package

        if self.device == "cuda":
            torch.cuda.init()  # type: ignore[no-untyped-call]  # before torch's runtime takes memory there
        return Package(path, single_threaded=single_threaded)

    def _build(self, request: BuildRequest, info: EngineInfo, scratch: Path) -> EngineInfo:
        """The engine, with what exporting and first runs found in its details."""
        request.progress(0.0, "torch.export")
        details = dict(info.details)
        programs, libraries = self._export(dataclasses.replace(request, signature=info.signature), scratch, details)
        info.write(scratch)
        directory, name = request.directory.absolute(), "TorchInductor in its worker process"
        packages = [(str(program), str(directory / program.name)) for program in programs]
        several = self._processes(len(packages))
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(Worker(command(), name=name, log=request.log)) for _ in range(several)]
            request.progress(0.3, "compilation")
            common: dict[str, Any] = {
                "timeout_s": request.timeout_s,
                "scratch": str(scratch),
                "libraries": libraries,
                "configs": self._configs(stateful=request.model.stateful, decoder=_in_place(request)),
            }
            with ThreadPoolExecutor(several) as pool:
                for done in [
                    pool.submit(worker.call, "compile", programs=dict(packages[number::several]), **common)
                    for number, worker in enumerate(workers)
                ]:
                    done.result()
            request.progress(0.9, "first runs")
            workers[0].call("load", timeout_s=request.timeout_s, directory=str(directory), info=str(scratch))
            check(_Remote(workers[0], info, scratch, request.timeout_s), request, "compiled")
            if self._replays(info):
                refusal = workers[0].call("refusal", timeout_s=request.timeout_s)["reason"]
                request.log(f"CUDA graph: {refusal or 'captured'}")
                details["cuda_graph"] = {"used": not refusal, "reason": refusal}
        return dataclasses.replace(info, details=details)

    def _processes(self, programs: int) -> int:
        """How many of them are compiled at a time; where kernels are measured on the GPU, one."""
        from ..compiler.machine import environment

        measured = self.device == "cuda" and (self.max_autotune or self.coordinate_descent)
        return 1 if measured else max(min(programs, environment.cores() // _CORES_FOR_ONE), 1)

    def _configs(self, *, stateful: bool, decoder: bool = False) -> dict[str, Any]:
        return {
            "freezing": self.freezing and self.device == "cpu" and not stateful and not decoder,
            "max_autotune": self.max_autotune,
            "coordinate_descent_tuning": self.coordinate_descent,
            "cpp.threads": self.threads or -1,
            "cpp.dynamic_threads": self.threads is None,
            **({"aot_inductor.package_constants_in_so": False} if decoder else {}),  # several programs share them
            # What is left for the host are launches: no need to find out which vector instructions it has, by programs.
            **({"cpp.vec_isa_ok": False} if self.device == "cuda" else {}),
        }

    def _export(self, request: BuildRequest, folder: Path, details: dict[str, Any]) -> tuple[list[Path], list[str]]:
        """Saves the programs in a folder, and returns their files and the modules whose operators they use.

        Args:
            details: takes what is found on the way.
        """
        import torch

        from ..compiler.sources.guard import first_line, foreign, quiet

        def failed(error: BaseException) -> BuildError:
            return BuildError("TorchInductor failed at torch.export", found=first_line(error), hint="see build.log")

        files = []
        libraries: set[str] = set()
        with torch.no_grad(), quiet(request.log), foreign(failed):
            programs = self._decoder(request) if _in_place(request) else {"model": self._program(request, details)}
            for name, program in programs.items():
                files.append(folder / f"{name}.pt2")
                torch.export.save(program, files[-1])
                libraries.update(_libraries(program))
        del programs, program
        gc.collect()  # programs refer to themselves, and the workers need the room
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return files, sorted(libraries)

    def _decoder(self, request: BuildRequest) -> dict[str, torch.export.ExportedProgram]:
        from .inductor import decoders

        programs = dict(decoders.export(request, self.device, kernels=self.device == "cuda"))
        decoders.saved(programs, request.directory)
        return programs

    def _program(self, request: BuildRequest, details: dict[str, Any]) -> torch.export.ExportedProgram:
        import torch

        from ..compiler.data import resized

        module = prepare(request, self.device)
        if any(_is_script(part) for part in module.modules()):
            raise BuildError("torch.export does not take TorchScript", hint="build this model with target torchscript")
        # torch.export takes a size of 1 for a constant.
        sizes = {name: min(max(size, 2), request.signature.axes[name].max) for name, size in _sizes(request).items()}
        inputs = tuple(tensors_of(resized(request.signature, request.sample, sizes), request, self.device))
        shapes = dynamic_shapes(request.signature, request.signature.axes)
        program = torch.export.export(module, inputs, dynamic_shapes=(shapes,), strict=False)
        if request.precision != "fp8":
            return program
        narrow = program.run_decompositions({}).module()  # nothing is decomposed, and nothing changed in place any more
        details["fp8"] = self._in_eight_bits(narrow, request)
        return torch.export.export(narrow, inputs, dynamic_shapes=shapes, strict=False)

    def _in_eight_bits(self, module: torch.fx.GraphModule, request: BuildRequest) -> dict[str, int]:
        """Puts FP8 into a module; returns how many linear layers have it, by how many samples."""
        from ..compiler.calibration.runner import samples_in
        from .inductor.eight_bits import quantize

        seen = 0

        def samples() -> Iterator[Sequence[torch.Tensor]]:
            nonlocal seen
            for batch in request.calibration or ():
                seen += samples_in(batch)
                yield tensors_of(batch, request, self.device)

        try:
            layers = quantize(module, samples())
        except ValueError as error:
            raise BuildError(str(error), hint="look at the calibration data, or build this model in fp16") from error
        if not layers:
            raise BuildError("no linear layer has sizes that FP8 takes", expected="multiples of 16", hint="use fp16")
        request.log(f"{layers} linear layers in FP8, by {seen} samples")
        return {"layers": layers, "samples": seen}

    def _requires(self, version: str) -> dict[str, str]:
        from ..compiler.machine import environment

        needs = {"torch": ".".join(version.split(".")[:2]), "machine": platform.machine()}
        if self.device == "cuda":
            return {**needs, "compute_capability": environment.compute_capability() or ""}
        flags = " ".join(environment.simd_flags())
        return {**needs, **({"cpu_flags": flags} if flags else {})}


class _Remote:
    """The engine in the worker, run and reset like the reference."""

    def __init__(self, worker: Worker, info: EngineInfo, scratch: Path, timeout_s: float) -> None:
        self._worker = worker
        self._info = info
        self._files = {"inputs": scratch / "inputs.npz", "outputs": scratch / "outputs.npz"}
        self._timeout_s = timeout_s

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs by name."""
        save_arrays(self._files["inputs"], [inputs[spec.name] for spec in self._info.signature.inputs])
        files: dict[str, Any] = {name: str(file) for name, file in self._files.items()}
        answer = self._worker.call("run", timeout_s=self._timeout_s, **files)
        if "failed" in answer:
            raise EngineError(answer["failed"])
        names = [spec.name for spec in self._info.signature.outputs]
        return dict(zip(names, load_arrays(self._files["outputs"]), strict=True))

    def reset(self) -> None:
        """Returns to the first state."""
        self._worker.call("reset", timeout_s=self._timeout_s)


def _missing_tool(device: str) -> tuple[str, str] | None:
    """What building needs beside torch and is not here, and what to do about it."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler {compiler!r}", "apt-get install g++, or set CXX"
    if sys.platform == "linux" and not _shares_runtime(compiler):
        reason = f"{compiler} links no shared C++ library: what it compiles has a copy of its own and crashes in torch"
        return reason, "set CXX to a compiler with a shared libstdc++, for instance CXX=/usr/bin/g++"
    if device == "cpu":
        return None
    if importlib.util.find_spec("triton") is None:
        return "no package triton, which compiles kernels for the GPU", "pip install triton"
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None:
        return "no CUDA toolkit", "install the toolkit of the CUDA version that torch has, or set CUDA_HOME"
    if not (header := Path(CUDA_HOME, "include", "cuda.h")).is_file():
        return f"no {header}", "install the headers of the CUDA toolkit, or set CUDA_HOME to a toolkit that has them"
    return None


@functools.cache
def _shares_runtime(compiler: str) -> bool:
    """Whether what this compiler links uses the shared C++ library, the one that torch uses.

    With a second, static copy the standard facets of a locale have other numbers, and std::regex calls the wrong one.
    """
    with tempfile.TemporaryDirectory(prefix="enginesmith-") as folder:
        library = Path(folder) / "probe.so"
        command = [compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
        source = b"#include <new>\nvoid* probe() { return ::operator new(1); }\n"
        linked = subprocess.run(command, input=source, capture_output=True, check=False).returncode == 0
        return linked and any(name in library.read_bytes() for name in (b"libstdc++.so", b"libc++.so"))


def _libraries(program: torch.export.ExportedProgram) -> list[str]:
    """Imported modules that bring operators of the program, known by namespace: torchvision brings torchvision::nms."""
    import torch

    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    targets = [node.target for graph in graphs for node in graph.nodes]
    spaces = {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}
    return sorted(space for space in spaces if space in sys.modules)


def _check_fp8(request: BuildRequest) -> None:
    """Raises BuildError for a decoder, and RecipeError where there is nothing to see ranges in."""
    if request.signature.states:
        raise BuildError("products of a decoder have no FP8 here", hint="build it in fp16")
    if request.calibration is None:
        raise RecipeError(
            "precision fp8 needs calibration data, to see the ranges of what linear layers read",
            hint="give --data with 32 to 512 real samples, or --random-calibration",
        )


def _sizes(request: BuildRequest) -> dict[str, int]:
    return request.signature.check(request.sample)


def _in_place(request: BuildRequest) -> bool:
    """Whether a model is built as programs that write into their caches; NumPy has none in bfloat16."""
    return bool(request.signature.states) and request.precision != "bf16"


def _is_script(module: torch.nn.Module) -> bool:
    import torch

    return isinstance(module, torch.jit.ScriptModule)
