"""Where the time goes when torch runs the model itself: by operator, and by the module that calls it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import EngineError
from ...targets._torch_profile import MODULE, Operation, operations
from ..benchmark.baselines import TorchEager
from ..sources import Model
from .use import Use, watch

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Row:
    """An operator or a module: what it takes of a call by itself. `flops` is 0 where torch has no formula."""

    name: str
    ms: float
    count: int
    flops: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Eager:
    """The model in torch. A module's row counts what it calls itself, not what modules within it call."""

    device: str
    calls: int
    use: Use
    operators: tuple[Row, ...]
    modules: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = {name: [row.to_json() for row in getattr(self, name)] for name in ("operators", "modules")}
        return {"device": self.device, "calls": self.calls, "use": self.use.to_json(), **rows}


def profile_model(model: Model, inputs: Mapping[str, np.ndarray], device: str) -> Eager:
    """Profiles the model in torch, in fp32.

    Raises:
        EngineError: it fails on the inputs.
        TargetUnavailableError: it holds no torch module, or there is no such device.
    """
    runner = TorchEager(model, device)
    with contextlib.closing(runner):
        bound = runner.bind(inputs)

        def run() -> None:
            bound.run()
            bound.synchronize()

        try:
            use = watch(bound, on_gpu=device == "cuda")
            with named(getattr(runner.module, "model", runner.module)):
                found, calls = operations(run, device)
        except RuntimeError as error:
            raise EngineError(f"the model failed in torch: {str(error).splitlines()[0]}") from error
    return Eager(device, calls, use, _summed(found, "operator"), _summed(found, "module"))


@contextlib.contextmanager
def named(module: torch.nn.Module) -> Iterator[None]:
    """Has the profiler see the name of each module around what its forward does."""
    import torch

    inside: list[Any] = []

    def before(name: str) -> Any:
        def enter(*_: object) -> None:
            inside.append(torch.profiler.record_function(f"{MODULE}{name}"))
            inside[-1].__enter__()

        return enter

    def after(*_: object) -> None:
        if inside:
            inside.pop().__exit__(None, None, None)

    hooks = []
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):  # takes no hooks once it is compiled
            continue
        hooks.append(part.register_forward_pre_hook(before(name or type(part).__name__)))
        hooks.append(part.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _summed(found: list[Operation], by: str) -> tuple[Row, ...]:
    rows: dict[str, Row] = {}
    for operation in found:
        name = getattr(operation, by) or "outside of modules"
        row = rows.get(name, Row(name, 0.0, 0, 0.0))
        rows[name] = Row(name, row.ms + operation.ms, row.count + operation.count, row.flops + operation.flops)
    return tuple(sorted(rows.values(), key=lambda row: -row.ms))
