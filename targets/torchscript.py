"""TorchScript: the module traced, frozen, and run by torch's own interpreter."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import BuildError, RecipeError
from ._torch import MINIMUM_TEXT, TorchRunner, check, last_line, prepare, require, tensors_of, torch_availability
from .base import Arrays, Availability, BuildRequest, Capabilities, EngineInfo, Runner, Target, Tuning
from .profile import Profile

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class TorchScript(Target):
    """A TorchScript archive. Parts of the model that are TorchScript already keep their control flow and state.

    fp16 holds and computes everything in half precision, with casts where inputs and outputs have other dtypes.

    Attributes:
        device: where the engine runs.
        freeze: whether weights become constants of the graph, which lets torch fold and fuse.
        optimize: whether torch fuses and chooses layouts for this processor, each time the engine is loaded: what
            `torch.jit.optimize_for_inference` makes cannot be saved.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    freeze: bool = True
    optimize: bool = True

    name: ClassVar[str] = "torchscript"
    summary: ClassVar[str] = "TorchScript archive, run by torch"
    capabilities: ClassVar[Capabilities] = Capabilities(
        consumes="module", precisions=("fp32", "fp16"), devices=("cpu", "cuda"), minimum={"torch": MINIMUM_TEXT}
    )

    def __post_init__(self) -> None:
        if self.optimize and not self.freeze:
            raise RecipeError("optimize=true needs freeze=true", found=str(self), hint="add optimize=false")

    def tunings(self, precision: str) -> tuple[Tuning, ...]:
        """What torch does to the graph; threads are the process's, which other engines run in too."""
        return (
            Tuning("fusions by torch", ({"optimize": False},)),
            Tuning("weights as constants", ({"freeze": False, "optimize": False},), "thorough"),
        )

    def availability(self) -> Availability:
        """Imports torch and looks for the device."""
        return torch_availability(self.device)

    def built_for(self) -> Mapping[str, str]:
        """The version of torch: what is for one processor or GPU is made when the archive is loaded."""
        return self.versions()

    def build(self, request: BuildRequest) -> EngineInfo:
        """Traces, freezes and saves the module, loads it again and compares it with the model."""
        require(state := self.availability(), to_build=True)
        module = prepare(request, self.device)
        entry = request.directory / "model.pt"
        self._save(module, request, entry)
        requires = {"torch": ".".join(state.versions["torch"].split(".")[:2])}
        info = self.info(request, entry.name, state.versions, requires=requires, stateful=request.model.stateful)
        check(self.runner(request.directory, info), request, "traced")
        return info

    def runner(self, directory: Path, info: EngineInfo) -> Runner:
        """Loads the archive."""
        require(self.availability())
        return TorchRunner(lambda: self._load(directory / info.entry), info, self.device)

    def profile(self, directory: Path, info: EngineInfo, inputs: Arrays) -> Profile | str:
        """By torch's profiler."""
        from ._torch_profile import profile_runner

        return profile_runner(self.runner(directory, info), inputs, self.device, info.precision)

    def _load(self, path: Path) -> torch.jit.ScriptModule:
        import torch

        load: Callable[..., torch.jit.ScriptModule] = torch.jit.load
        module = load(str(path), map_location=self.device).eval()
        return torch.jit.optimize_for_inference(module) if self.optimize else module

    def _save(self, module: torch.nn.Module, request: BuildRequest, entry: Path) -> None:
        import torch

        from ..compiler.sources.guard import foreign, quiet

        def failed(error: BaseException) -> BuildError:
            return BuildError(
                f"torch.jit could not trace the model in {request.precision}",
                found=f"{type(error).__name__}: {last_line(error)}",
                hint="see build.log",
            )

        trace: Callable[..., torch.jit.ScriptModule] = torch.jit.trace
        with torch.no_grad(), quiet(request.log), foreign(failed):
            # Tracing runs the model once, so the state of that run must not be what is saved.
            first_state = copy.deepcopy(module) if request.model.stateful else module
            inputs = tuple(tensors_of(request.sample, request, self.device))
            traced = trace(module, inputs, check_trace=False)
            _restore(traced, first_state)
            (torch.jit.freeze(traced.eval()) if self.freeze else traced).save(str(entry))


def _restore(traced: Any, first_state: torch.nn.Module) -> None:
    """Puts buffers and parts that are TorchScript themselves back to their first state."""
    import torch

    buffers = dict(traced.named_buffers(recurse=False))
    for name, buffer in first_state.named_buffers(recurse=False):
        if name in buffers and buffers[name] is not buffer:
            buffers[name].copy_(buffer)
    for name, child in first_state.named_children():
        if not hasattr(traced, name):
            continue
        if isinstance(child, torch.jit.ScriptModule):
            traced._c.setattr(name, child._c)
        else:
            _restore(getattr(traced, name), child)
