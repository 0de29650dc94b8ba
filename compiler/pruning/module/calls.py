"""In which order the parts of a torch module run, and which of them hand their result straight to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ...signature import Signature
from ...sources.flat import FlatModule
from ...sources.guard import quiet
from ...sources.reference import to_tensor


@dataclasses.dataclass(frozen=True)
class Calls:
    """What one run of a module tells.

    Attributes:
        order: names of the parts with tensors of their own, as they ran; one that ran twice stands there twice. Empty
            for programs, which run no parts.
        next: by the name of a part, the part that took its result as it was.
    """

    order: tuple[str, ...]
    next: Mapping[str, str]


def watch(module: FlatModule, signature: Signature, sample: Mapping[str, np.ndarray]) -> Calls:
    """Runs a module once, and watches the parts of the user's module inside it."""
    order: list[str] = []
    following: dict[str, str] = {}
    made: dict[int, tuple[str, torch.Tensor]] = {}  # with the tensor, so that no other takes its id

    def hook(name: str) -> Callable[[torch.nn.Module, tuple[Any, ...], Any], None]:
        def called(part: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            order.append(name)
            if inputs and id(inputs[0]) in made:
                following[made[id(inputs[0])][0]] = name
            if isinstance(output, torch.Tensor):
                made[id(output)] = name, output

        return called

    owners = [(n, part) for n, part in module.model.named_modules() if n and owns_tensors(part)]
    handles = [part.register_forward_hook(hook(name)) for name, part in owners]
    try:
        with torch.no_grad(), quiet():
            module(*arguments(module, signature, sample))
    finally:
        for handle in handles:
            handle.remove()
    return Calls(tuple(order), following)


def owns_tensors(part: torch.nn.Module) -> bool:
    """Whether a part has parameters or buffers that are no deeper part's."""
    return any(True for _ in part.parameters(recurse=False)) or any(True for _ in part.buffers(recurse=False))


def arguments(
    module: torch.nn.Module, signature: Signature, sample: Mapping[str, np.ndarray]
) -> tuple[torch.Tensor, ...]:
    """The tensors of a sample in the order of the signature, where the module's weights are."""
    weight = next(module.parameters(), None)
    device = weight.device if weight is not None else torch.device("cpu")
    return tuple(to_tensor(sample[spec.name], spec.dtype).to(device) for spec in signature.inputs)
