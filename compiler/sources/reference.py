"""References that run in torch."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Mapping

import numpy as np
import torch

from ...errors import SourceError
from ..signature import Signature
from .flat import FlatModule
from .guard import first_line, foreign, where


class TorchReference:
    """Runs a `FlatModule` in the precision of its weights, without TF32. `restore` makes the model anew."""

    def __init__(
        self, module: FlatModule, inputs: Signature, device: str, restore: Callable[[], torch.nn.Module] | None
    ) -> None:
        self._module = module
        self._inputs = inputs
        self._device = device
        self._restore = restore

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, on the host; bfloat16 ones as float32, for NumPy has no bfloat16."""
        return {name: to_array(tensor) for name, tensor in self.outputs(inputs)[0].items()}

    def outputs(self, inputs: Mapping[str, np.ndarray]) -> tuple[dict[str, torch.Tensor], object]:
        """Outputs as tensors by name, and how they nest."""
        tensors = [to_tensor(inputs[spec.name], spec.dtype).to(self._device) for spec in self._inputs.inputs]
        shapes = ", ".join(f"{s.name} {tuple(t.shape)}" for s, t in zip(self._inputs.inputs, tensors, strict=True))
        # Not inference_mode: a module that keeps a tensor from one call to the next could not be exported after it.
        with (
            torch.no_grad(),
            _exact(),
            contextlib.redirect_stdout(io.StringIO()),
            foreign(lambda error: _failed(error, shapes)),
        ):
            return self._module.named(*tensors)

    def reset(self) -> None:
        """Puts the model as it was loaded in the place of the one that has run."""
        if self._restore is not None:
            self._module.model = self._restore()

    def keep(self) -> None:
        """Forgets how to restore, which frees the copy: the model has no state."""
        self._restore = None


def snapshot(model: torch.nn.Module) -> Callable[[], torch.nn.Module] | None:
    """How to bring a module back to how it is now. Parameters are shared, buffers and attributes copied.

    None where the module cannot be copied (it holds a lock, a file, a tensor inside an autograd graph).
    """
    shared = {id(parameter): parameter for parameter in model.parameters()}
    try:
        saved = copy.deepcopy(model, dict(shared))
    except (TypeError, RuntimeError, AttributeError, ValueError):
        return None
    return lambda: copy.deepcopy(saved, dict(shared))


def to_tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    """A tensor of that dtype; shares the array's memory where it can."""
    array = np.asarray(array, order="C")
    array = array if array.flags.writeable else array.copy()
    return torch.from_numpy(array).to(getattr(torch, dtype))


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """A host array of its own; bfloat16 becomes float32."""
    host = tensor.detach().to("cpu")
    host = host.float() if host.dtype is torch.bfloat16 else host
    return host.numpy().copy()


def _exact() -> contextlib.AbstractContextManager[None]:
    context: contextlib.AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    return context


def _failed(error: BaseException, shapes: str) -> SourceError:
    return SourceError(
        f"the model failed when it was run, at {where(error)}",
        expected="a forward that takes the inputs as declared",
        found=f"{first_line(error)} (inputs: {shapes})",
        hint="check --input and --dynamic, or give --data with values that the model accepts",
    )
