"""What the two targets that run in torch share: the module to build from, the runner, and a check of what was built."""

from __future__ import annotations

import contextlib
import copy
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BuildError, EngineError, TargetUnavailableError
from .base import Arrays, Availability, Bound, BuildRequest, EngineInfo

if TYPE_CHECKING:
    import torch

    from ..compiler.signature import AxisRange, Signature
    from ..compiler.sources import Reference

MINIMUM = (2, 9)
MINIMUM_TEXT = "2.9"
ANY_RESULT = {"relative_l2": 0.5, "max_abs": 1.0, "cosine": 0.8, "top1": 0.0}
"""Bounds that only something quite different misses, such as a batch that was cut or repeated."""


def torch_availability(device: str) -> Availability:
    """Imports torch and looks for the device."""
    try:
        import torch
    except ImportError as error:
        return Availability(
            build=False, run=False, reason=f"torch cannot be imported: {error}", install="pip install torch"
        )
    versions = {"torch": str(torch.__version__)}
    if tuple(int(part) for part in versions["torch"].split(".")[:2]) < MINIMUM:
        reason = f"torch {torch.__version__} is too old, {MINIMUM_TEXT} or newer is needed"
        return Availability(
            build=False, run=False, reason=reason, install="pip install --upgrade torch", versions=versions
        )
    if device == "cpu" or torch.cuda.is_available():
        return Availability(build=True, run=True, versions=versions)
    if torch.version.cuda is None:
        reason, install = f"torch {torch.__version__} is built without CUDA", "install a CUDA build of torch"
    else:
        reason, install = f"torch {torch.__version__} finds no GPU", "check the driver with nvidia-smi"
    return Availability(build=False, run=False, reason=reason, install=install, versions=versions)


def on_gpu(device: str) -> bool:
    """Whether this is a GPU: "cuda", which is the current one of a thread, or one by its number, "cuda:1"."""
    return device.startswith("cuda")


def require(state: Availability, *, to_build: bool = False) -> None:
    """Raises TargetUnavailableError where a device, package or compiler is missing."""
    if not (state.build if to_build else state.run):
        raise TargetUnavailableError(state.reason, hint=state.install)


def prepare(request: BuildRequest, device: str) -> torch.nn.Module:
    """The module in its first state, on the device and in the precision; it takes ``*tensors`` and gives a tuple.

    For fp8 it is in fp16.

    Raises:
        BuildError: the model is no torch module, or one that cannot be copied.
    """
    import torch

    from ..compiler.sources.guard import quiet

    module = own_module(request)
    with quiet(request.log):
        if request.precision != "fp32" or request.model.stateful or not lies_on(module, device):
            module = copied(module)
        module = module.to(device)
        if request.precision == "fp32":
            return _casting(module, None, ())
        dtypes = [getattr(torch, spec.dtype) for spec in request.signature.outputs]
        dtype = torch.bfloat16 if request.precision == "bf16" else torch.float16
        return _casting(cast(module, dtype), dtype, dtypes)


def own_module(request: BuildRequest) -> torch.nn.Module:
    """The module that a model holds, in its first state.

    Raises:
        BuildError: it holds none.
    """
    if request.model.module is None:
        raise BuildError(
            f"a model of kind {request.model.kind!r} holds no torch module",
            hint="build it with an ONNX target, for instance onnxruntime-cpu",
        )
    request.model.reference.reset()
    module: torch.nn.Module = request.model.module
    return module


def lies_on(module: torch.nn.Module, device: str) -> bool:
    """Whether all weights are on a device of this type."""
    return all(parameter.device.type == device for parameter in module.parameters())


def copied(module: torch.nn.Module, shared: Iterable[torch.Tensor] = ()) -> torch.nn.Module:
    """A copy that has these tensors in common with the module.

    Raises:
        BuildError: the module does not let itself be copied.
    """
    try:
        return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})
    except (TypeError, RuntimeError, AttributeError, ValueError) as error:
        raise BuildError(f"the model cannot be copied: {error}") from error


def cast(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Turns floating-point weights into `dtype`, but for the frequencies of rotary embeddings.

    Angles are positions times these (`inv_freq`, or `..._inv_freq`), which transformers computes in float32 in whatever
    type it loads a model: with frequencies in float16 an angle near position 4096 is wrong by more than half a radian.
    Other buffers, persistent or not, are added to what is in `dtype` and go with it.
    """
    named = module.named_buffers(remove_duplicate=False)
    kept = {name: buffer for name, buffer in named if name.endswith("inv_freq")}
    module = module.to(dtype)
    for name, buffer in kept.items():
        owner, _, own_name = name.rpartition(".")
        setattr(module.get_submodule(owner), own_name, buffer)
    return module


def dynamic_shapes(signature: Signature, axes: Mapping[str, AxisRange]) -> tuple[dict[int, Any], ...]:
    """A `torch.export.Dim` for each axis with a range, the same one wherever the axis stands."""
    from torch.export import Dim

    dims = {
        name: Dim(re.sub(r"\W", "_", f"axis_{name}"), min=axis.min, max=axis.max)
        for name, axis in axes.items()
        if axis.min < axis.max
    }
    return tuple(
        {axis: dims[dim] for axis, dim in enumerate(spec.shape) if isinstance(dim, str) and dim in dims}
        for spec in signature.inputs
    )


def exact() -> contextlib.AbstractContextManager[Any]:
    """Keeps convolutions on a GPU from being computed in TF32, which torch allows them."""
    import torch

    benchmark = torch.backends.cudnn.benchmark
    return torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, deterministic=False, allow_tf32=False)


def tensors_of(arrays: Arrays, info: EngineInfo | BuildRequest, device: str) -> list[torch.Tensor]:
    """The inputs as tensors on the device, in the signature's order."""
    return [to_tensor(arrays[spec.name], spec.dtype, device) for spec in info.signature.inputs]


def to_tensor(value: Any, dtype: str, device: str) -> torch.Tensor:
    """A contiguous tensor on the device; shares memory with an array or DLPack tensor that lies there already."""
    import torch

    if not isinstance(value, (np.ndarray, np.generic)):
        tensor: torch.Tensor = value if isinstance(value, torch.Tensor) else torch.utils.dlpack.from_dlpack(value)
        return tensor.detach().to(device).contiguous()
    array = np.asarray(value, order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(device)
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor.to(device=device, dtype=getattr(torch, dtype))


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor on the host; bfloat16 becomes float32, which NumPy has."""
    import torch

    host = tensor.detach().cpu()
    array: np.ndarray = (host.float() if host.dtype is torch.bfloat16 else host).numpy()
    return array


def _casting(module: torch.nn.Module, dtype: torch.dtype | None, outputs: Sequence[torch.dtype]) -> torch.nn.Module:
    """Calls `module` with floating-point inputs cast to `dtype`, and casts its outputs to their own dtypes."""
    import torch

    class Casting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if dtype is None:
                return tuple(self.inner(*tensors))
            given = (tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors)
            return tuple(t.to(wanted) for t, wanted in zip(self.inner(*given), outputs, strict=True))

    return Casting().eval()


class TorchRunner:
    """A callable on flat tensors as a `Runner`.

    Args:
        load: opens the engine in its first state.
    """

    def __init__(self, load: Callable[[], Callable[..., Any]], info: EngineInfo, device: str) -> None:
        import torch

        self._torch = torch
        self._load = load
        self._info = info
        self._device = device
        self._lock = threading.Lock()
        self._precision = exact if on_gpu(device) and info.precision == "fp32" else contextlib.nullcontext
        self._module: Callable[..., Any] | None = self._open()

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """NumPy arrays in give NumPy arrays out; any tensor among the inputs gives tensors on the engine's device."""
        outputs = self.call(tensors_of(inputs, self._info, self._device))
        if any(not isinstance(value, (np.ndarray, np.generic)) for value in inputs.values()):
            return outputs
        arrays = {name: to_array(tensor) for name, tensor in outputs.items()}
        # The state may be an output, and the next call changes it in place.
        return {name: array.copy() for name, array in arrays.items()} if self._info.stateful else arrays

    def bind(self, inputs: Arrays) -> Bound:
        """The inputs as tensors on the device."""
        return TorchBound(self, tensors_of(inputs, self._info, self._device), self._device)

    def reset(self) -> None:
        """Opens an engine with state anew."""
        if self._info.stateful:
            self._module = self._open()

    def close(self) -> None:
        """Lets go of the engine; it is freed once no call uses it."""
        self._module = None

    def call(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by name; on a GPU they may not be computed yet."""
        module = self._module
        if module is None:
            raise EngineError(f"engine {self._info.name} is closed", hint="load it again")
        try:
            with self._torch.no_grad(), self._precision():
                outputs = self._one_at_a_time(module, tensors) if self._info.stateful else module(*tensors)
        except RuntimeError as error:
            raise EngineError(f"engine {self._info.name} failed to run: {last_line(error)}") from error
        return {spec.name: tensor for spec, tensor in zip(self._info.signature.outputs, outputs, strict=True)}

    def _one_at_a_time(self, module: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> Any:
        with self._lock:
            return module(*tensors)

    def _open(self) -> Callable[..., Any]:
        try:
            with warnings.catch_warnings():  # torch's about its own TorchScript are not for those who load an engine
                warnings.simplefilter("ignore")
                return self._load()
        except (RuntimeError, OSError) as error:
            raise EngineError(f"engine {self._info.name} cannot be opened: {last_line(error)}") from error


class TorchBound:
    """Tensors on the device, run again and again."""

    def __init__(self, runner: TorchRunner, tensors: Sequence[torch.Tensor], device: str) -> None:
        self._runner = runner
        self._tensors = tensors
        self._device = device
        self._on_gpu = on_gpu(device)
        self._outputs: dict[str, torch.Tensor] = {}

    def run(self) -> None:
        """Starts one execution."""
        self._outputs = self._runner.call(self._tensors)

    def synchronize(self) -> None:
        """Waits for the GPU."""
        if self._on_gpu:
            import torch

            torch.cuda.synchronize(self._device)

    def timed(self, iterations: int) -> tuple[list[float], list[float] | None]:
        """Milliseconds of each run: of the host until the device is done, and of the device between two events."""
        import torch

        host, device = [], []
        event: Any = torch.cuda.Event
        marks = [event(enable_timing=True) for _ in range(2)] if self._on_gpu else []
        for _ in range(iterations):
            start = time.perf_counter_ns()
            for mark in marks[:1]:
                mark.record(torch.cuda.current_stream(self._device))
            self.run()
            for mark in marks[1:]:
                mark.record(torch.cuda.current_stream(self._device))
            self.synchronize()
            host.append((time.perf_counter_ns() - start) / 1e6)
            if marks:
                device.append(marks[0].elapsed_time(marks[1]))
        return host, device if marks else None

    def outputs(self) -> dict[str, np.ndarray]:
        """The outputs of the last run, on the host."""
        return {name: to_array(tensor) for name, tensor in self._outputs.items()}


def check(runner: Reference, request: BuildRequest, how: str) -> None:
    """Compares what was built with the model at the sample's sizes, at another size of each dynamic axis, and of all.

    A decoder is called with tokens and caches of all kinds, for rows that are alike would hide that they are mixed up.

    Raises:
        BuildError: they differ, as they do where sizes or state were recorded as constants; or the process that runs
            it failed; or values overflow float16.
    """
    from ..compiler.data import other_sizes, random_batch, resized
    from ..compiler.sources.guard import quiet
    from ..compiler.validation.metrics import Judge, coarser, resolve_tolerance
    from ..compiler.validation.reference import bounded

    signature, reference = request.signature, request.model.reference
    sizes = signature.check(request.sample)
    other = next((s for s in map(signature.sizes, ("min", "opt", "max")) if s != sizes), sizes)
    points = [sizes, *(bounded(signature, point) for point in (other, *other_sizes(signature)))]
    generator = np.random.default_rng(0)
    for point in (point for number, point in enumerate(points) if point not in points[:number]):
        own = coarser("fp32", (spec.dtype for spec in signature.outputs))
        judge = Judge(resolve_tolerance(own, None if request.precision == "fp32" else ANY_RESULT))
        made_up = signature.states and point != sizes
        inputs = random_batch(signature, generator, point) if made_up else resized(signature, request.sample, point)
        reference.reset()
        runner.reset()
        try:
            with quiet(request.log):
                for _ in range(2 if request.model.stateful else 1):
                    judge.update(reference.run(inputs), runner.run(inputs))
        except BuildError:
            raise
        except EngineError as error:
            raise _wrong(how, point, error.message) from error
        metrics = judge.metrics()
        found = [f"{m['output']}: {reason}" for m in metrics for reason in m["failures"]]
        if request.precision in ("fp16", "fp8") and any(m["nan"] or m["inf"] for m in metrics):
            raise BuildError(
                f"values overflow float16 in the {how} module, where the model's own outputs are finite",
                expected="values up to 65504 in weights and in between",
                found="; ".join(found),
                hint="build this model in fp32",
            )
        if found:
            raise _wrong(how, point, "; ".join(found))


def _wrong(how: str, point: Mapping[str, int], found: str) -> BuildError:
    sizes = ", ".join(f"{name}={size}" for name, size in point.items()) or "the sample's sizes"
    return BuildError(
        f"the {how} module does not do what the model does at {sizes}",
        expected="the model's own outputs",
        found=found,
        hint="look in forward for sizes or state turned into Python numbers, and for branches on values",
    )


def last_line(error: BaseException) -> str:
    """The line that tells: of a TorchScript error the last one, below the stack; CUDA's come before hints."""
    lines = str(error).strip().splitlines()
    told = [line for line in lines if line.startswith("CUDA error")]
    return (told or lines[-1:] or [type(error).__name__])[0]
