"""Decoders as programs that write into their caches, which TorchInductor compiles each by itself.

    one     one new token of one row
    many    one new token of each of several rows
    any     any number of new tokens, as prompts have

    logits = any(ids, past, count, *caches)
    logits, largest logit, its token = one(ids, past, count, *caches)

All of them have the same weights, which lie beside them in a file of their own.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...compiler.data import resized
from ...compiler.signature import AxisRange, Signature
from ...compiler.sources.decoders.module import keeping
from ...compiler.sources.decoders.writing import InPlace, Single, plain_layers
from ...compiler.states import BACK, IDS, IMPORTANCE, LOGITS, as_stored, caches, rates
from .._torch import cast, copied, dynamic_shapes, lies_on, own_module, tensors_of
from ..base import BuildRequest
from . import products
from .operators import largest, operators

ONE, MANY, ANY = "one", "many", "any"
WEIGHTS = "weights.safetensors"


def stored(signature: Signature, precision: str) -> Signature:
    """What an engine takes and gives: caches in its precision, but for those that add up attention."""
    if precision != "fp16":
        return signature
    return as_stored(
        signature, {spec.name: "float16" for spec in caches(signature) if not spec.name.startswith(IMPORTANCE)}
    )


def ranges(signature: Signature) -> dict[str, dict[str, AxisRange]]:
    """The programs of a decoder, and what sizes of its axes they take."""
    batch, time = signature.input(IDS).shape
    fixed = {axis: AxisRange(1, 1, 1) for axis in (time, *_kept(signature)) if isinstance(axis, str)}
    found = {ANY: dict(signature.axes)}
    if not isinstance(batch, str):
        return {(ONE if batch == 1 else MANY): fixed, **found}
    axis = signature.axes[batch]
    if axis.min == 1:
        found[ONE] = {**fixed, batch: AxisRange(1, 1, 1)}
    if axis.max > 1:
        least = max(axis.min, 2)
        found[MANY] = {**fixed, batch: AxisRange(least, max(axis.opt, least), axis.max)}
    return found


def program_for(names: Sequence[str], rows: int, length: int, kept: int) -> str:
    """Which of these programs takes a call."""
    name = ANY if length > 1 or kept > 1 else ONE if rows == 1 else MANY
    return name if name in names else ANY


def export(request: BuildRequest, device: str, *, kernels: bool) -> Iterator[tuple[str, torch.export.ExportedProgram]]:
    """The programs of a model, whose request has the signature of `stored`.

    Args:
        kernels: whether calls of one token a row are made of the operators that have kernels of their own.
    """
    module = _module(request, device)
    products.replace(module)
    layers: frozenset[int] = frozenset()
    if kernels and not rates(request.signature):
        layers = plain_layers(lambda: module(*_example(request, {}, device)))
    for name, axes in ranges(request.signature).items():
        step = name != ANY
        rows: Any = InPlace
        if step and kernels:
            rows = functools.partial(Single, layers=layers, operator=operators().attend.default)
        with torch.no_grad(), keeping(rows), products.fusing(step and kernels):
            program = torch.export.export(
                _Call(module, request.signature, operators().largest if kernels else largest, step=step).eval(),
                _example(request, axes, device),
                dynamic_shapes=(dynamic_shapes(request.signature, axes),),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,  # that 2 x is the least of 2 x and 4 x is not proved
            )
        if step and kernels:
            products.fuse(program.graph_module.graph, norms=name == ONE)
            program.graph_module.recompile()
        yield name, program


def saved(programs: Mapping[str, torch.export.ExportedProgram], folder: Path) -> None:
    """Writes the tensors of all programs, each once, under which other names programs know them, and where they lie.

    Of a model on a GPU a constant in its code may lie on the host, and is expected there.
    """
    from safetensors.torch import save_file

    found: dict[str, torch.Tensor] = {}
    for name, program in programs.items():
        for key, value in {**program.constants, **program.state_dict}.items():
            if isinstance(value, torch.Tensor):
                found[key if key in program.state_dict else f"{name}/{key}"] = value.detach()
    firsts: dict[tuple[Any, ...], str] = {}
    names = {}
    for key, value in found.items():
        place = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        names[key] = firsts.setdefault(place if value.numel() else (key,), key)
    tensors = {key: found[key].contiguous() for key in dict.fromkeys(names.values())}
    on_host = [key for key, tensor in tensors.items() if tensor.device.type == "cpu"]
    save_file(tensors, folder / WEIGHTS, metadata={"names": json.dumps(names), "on_host": json.dumps(on_host)})
    (folder / WEIGHTS).chmod(folder.stat().st_mode & 0o666)  # it is made for its owner alone


def tensors(folder: Path, device: str) -> dict[str, torch.Tensor]:
    """What `saved` wrote, on a device, but for what lay on the host, by all names."""
    from safetensors import safe_open

    with (
        safe_open(folder / WEIGHTS, framework="pt", device=device) as file,
        safe_open(folder / WEIGHTS, framework="pt", device="cpu") as host,
    ):
        names, on_host = (json.loads(file.metadata().get(key, "[]")) for key in ("names", "on_host"))
        found = {key: (host if key in on_host else file).get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return {name: found[key] for name, key in names.items()}


class _Call(torch.nn.Module):
    """A decoder as a flat function that gives its logits, and leaves its caches changed."""

    def __init__(
        self, module: torch.nn.Module, signature: Signature, largest: Callable[..., Any], *, step: bool
    ) -> None:
        super().__init__()
        self.module = module
        self._largest = largest if step else None
        inputs = [spec.name for spec in signature.inputs]
        outputs = [spec.name for spec in signature.outputs]
        self._logits = outputs.index(LOGITS)
        self._caches = [(inputs.index(name), outputs.index(made)) for name, made in signature.states.items()]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.module(*tensors)
        for given, made in self._caches:
            if outputs[made] is not tensors[given]:
                tensors[given].copy_(outputs[made])
        logits = outputs[self._logits]
        if self._largest is None:
            return (logits,)
        best, token = self._largest(logits.reshape(logits.shape[0], logits.shape[-1]))
        return logits, best, token


def _module(request: BuildRequest, device: str) -> torch.nn.Module:
    """The model on the device and in the precision, to be changed; in float32 it shares the weights.

    All lie in memory as `saved` stores them, for programs take them to lie as they do when they are traced.

    Raises:
        BuildError: the model holds no torch module, or one that cannot be copied.
    """
    module = own_module(request)
    shared = lies_on(module, device) and request.precision == "fp32"
    made = copied(module, (p for p in module.parameters() if shared and p.is_contiguous())).to(device)
    if request.precision != "fp32":
        made = cast(made, torch.float16)
    for tensor in (*made.parameters(), *made.buffers()):
        if not tensor.is_contiguous():
            tensor.data = tensor.data.contiguous()
    return made


def _example(request: BuildRequest, axes: Mapping[str, AxisRange], device: str) -> tuple[torch.Tensor, ...]:
    """A call of a program that takes these sizes; torch.export takes a size of 1 for a constant."""
    signature = request.signature
    sizes = {name: signature.axes[name].min for name in signature.axes}
    sizes.update({name: min(max(axis.min, 2), axis.max) for name, axis in axes.items()})
    return tuple(tensors_of(resized(signature, request.sample, sizes), request, device))


def _kept(signature: Signature) -> tuple[str | int, ...]:
    return tuple(size for spec in signature.inputs if spec.name == BACK for size in spec.shape)
