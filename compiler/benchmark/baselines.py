"""The model in torch, run as an engine, to be the baseline of benchmarks: eager, and through torch.compile."""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...errors import BuildError, TargetUnavailableError
from ...targets.base import Arrays, Bound, HostBound
from ..sources import Model
from .rounds import Candidate

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "fp16"]

COMPILE_LIMIT = 64
"""Sizes that torch.compile may specialize for; by default it gives up after 8 and runs eagerly without a word."""


def torch_baselines(
    model: Model, *, device: str = "cpu", precisions: tuple[Precision, ...] = ("fp32",), compiled: bool = False
) -> list[Candidate]:
    """The candidates "torch" and, where `compiled`, "torch.compile"; " fp16" is appended where it is in half precision.

    Nothing is copied or compiled before the benchmark opens a candidate. torch.compile takes 30 to 60 s a size on two
    cores.
    """
    kinds = (TorchEager, TorchCompile) if compiled else (TorchEager,)
    return [
        Candidate(
            kind.name + (" fp16" if precision == "fp16" else ""), functools.partial(kind, model, device, precision)
        )
        for kind in kinds
        for precision in precisions
    ]


class TorchEager:
    """Runs the torch module as users do: inference mode, the module's own memory layout, torch's own settings.

    The last means that on a GPU "fp32" has its convolutions in TF32, which engines in fp32 do without.

    In fp32 on the model's own device it shares the module; else it works on a copy, and the state of a stateful copy is
    never reset (no timing depends on it). In fp16 weights and floating-point inputs are half, and so are the outputs.

    Raises:
        TargetUnavailableError: an ONNX source, or no such device.
    """

    name = "torch"

    def __init__(self, model: Model, device: str = "cpu", precision: Precision = "fp32") -> None:
        import torch

        if model.module is None:
            raise TargetUnavailableError(
                f"the baseline {self.name!r} needs a torch module",
                found=f"a source of kind {model.kind!r}",
                hint="choose an engine as the baseline",
            )
        if device == "cuda" and not torch.cuda.is_available():
            raise TargetUnavailableError(f"the baseline {self.name!r} finds no CUDA device", found="torch without CUDA")
        self._model = model
        self._device = device
        self._half = precision == "fp16"
        self._module: Any = model.module
        tensors = itertools.chain(model.module.parameters(), model.module.buffers())
        if self._half or any(tensor.device.type != device for tensor in tensors):
            self._module = copy.deepcopy(model.module).to(device, torch.float16 if self._half else None)

    @property
    def module(self) -> torch.nn.Module:
        """What is called: the model's own module, or a copy on the device."""
        module: torch.nn.Module = self._module
        return module

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Outputs by name, as NumPy arrays."""
        return self._fetch(self._call(self._place(inputs)))

    def bind(self, inputs: Arrays) -> Bound:
        """Places inputs on the device."""
        tensors = self._place(inputs)
        if self._device == "cpu":
            return HostBound(lambda: self._fetch(self._call(tensors)))
        return _CudaBound(self, tensors)

    def reset(self) -> None:
        """Returns a stateful model to its first state."""
        self._model.reference.reset()

    def close(self) -> None:
        """Lets go of the module."""
        self._module = None

    def _place(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        import torch

        placed = []
        for spec in self._model.signature.inputs:
            tensor = torch.as_tensor(inputs[spec.name], device=self._device)
            placed.append(tensor.half() if self._half and tensor.is_floating_point() else tensor)
        return placed

    def _call(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        import torch

        with torch.inference_mode():
            outputs: tuple[torch.Tensor, ...] = self._module(*tensors)
        return outputs

    def _fetch(self, outputs: tuple[torch.Tensor, ...]) -> dict[str, np.ndarray]:
        specs = self._model.signature.outputs
        return {spec.name: output.cpu().numpy() for spec, output in zip(specs, outputs, strict=True)}


class TorchCompile(TorchEager):
    """Runs the torch module through torch.compile, specialized to each size as engines are.

    On the CPU with Inductor's freezing: without it weights are not packed and ResNet-50 is slower than eager. On CUDA
    with `mode` "reduce-overhead", that is CUDA graphs: at small batches launches take most of the time (ResNet-50, b1:
    six times faster), which "max-autotune-no-cudagraphs" leaves in, while its search takes minutes a size.

    Raises:
        BuildError: it does not compile, at the first call with a size.
        TargetUnavailableError: as `TorchEager`, and for TorchScript.
    """

    name = "torch.compile"
    mode = "reduce-overhead"

    def __init__(self, model: Model, device: str = "cpu", precision: Precision = "fp32") -> None:
        import torch

        if isinstance(model.module, torch.jit.ScriptModule):
            raise TargetUnavailableError("torch.compile does not take TorchScript", hint="use the baseline 'torch'")
        super().__init__(model, device, precision)
        how: dict[str, Any] = {"options": {"freezing": True}} if device == "cpu" else {"mode": self.mode}
        self._module = torch.compile(self._module, dynamic=False, fullgraph=False, **how)
        self._seen: set[tuple[torch.Size, ...]] = set()

    def _call(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        import torch

        sizes = tuple(tensor.shape for tensor in tensors)
        if self._device == "cuda":
            # the last call's outputs may be overwritten
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        if sizes in self._seen:
            return super()._call(tensors)
        try:
            with torch._dynamo.config.patch(recompile_limit=COMPILE_LIMIT):
                outputs = super()._call(tensors)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise BuildError("torch.compile could not compile the model", found=reason) from error
        self._seen.add(sizes)
        return outputs


class _CudaBound:
    """Inputs on the GPU. Device times are between events around the call, so they hold the gaps between launches."""

    def __init__(self, owner: TorchEager, tensors: list[torch.Tensor]) -> None:
        self._owner = owner
        self._tensors = tensors
        self._outputs: tuple[torch.Tensor, ...] = ()

    def run(self) -> None:
        self._outputs = self._owner._call(self._tensors)

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()

    def timed(self, iterations: int) -> tuple[list[float], list[float] | None]:
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        host_ms, device_ms = [], []
        self.synchronize()
        for _ in range(iterations):
            began = time.perf_counter_ns()
            start.record()
            self.run()
            end.record()
            end.synchronize()
            host_ms.append((time.perf_counter_ns() - began) / 1e6)
            device_ms.append(start.elapsed_time(end))
        return host_ms, device_ms

    def outputs(self) -> dict[str, np.ndarray]:
        return self._owner._fetch(self._outputs)
