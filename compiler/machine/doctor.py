"""Whether each target works on this machine, by really building and running a one-node model on it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import EnginesmithError
from ...targets import COMPOSED, TARGETS, parse_target
from ...targets.base import Availability, BuildRequest, Target
from ..progress import Progress
from ..signature import AxisRange, Signature, TensorSpec
from .environment import environment

if TYPE_CHECKING:
    from ..sources import Model

SAMPLE = {"x": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)}


def diagnose(names: Sequence[str] = (), *, progress: Progress | None = None) -> dict[str, Any]:
    """Tries the targets (all where empty).

    Returns:
        `machine` (see `environment`, with `gpu_software`) and `targets`: each with `builds` and `runs` as its packages
        and devices promise, `usable` as the trial showed (None where it could not be tried), `reason` and `to_do`.

    Raises:
        UnknownNameError: no target of that name.
    """
    progress = progress or Progress()
    targets = [parse_target(name) for name in names or (name for name in TARGETS if name not in COMPOSED)]
    found = []
    for number, target in enumerate(targets, start=1):
        progress.stage(target.name, number, len(targets))
        state = target.availability()
        reason = state.reason
        usable: bool | None = None
        if state.build:
            problem = _try(target, state)
            usable, reason = not problem, problem or reason
        found.append(
            {
                "target": target.name,
                "builds": state.build,
                "runs": state.run,
                "usable": usable,
                "reason": reason,
                "to_do": state.install,
                "versions": dict(state.versions),
            }
        )
    machine = environment()
    return {"machine": {**machine, "gpu_software": _gpu_software(machine)}, "targets": found}


def _gpu_software(machine: Mapping[str, Any]) -> dict[str, str]:
    """Driver, CUDA and cuDNN, those that are missing too: people look here for what a GPU target lacks."""
    cuda, packages = machine.get("cuda", {}), machine["packages"]
    cudnn = [version for name, version in packages.items() if name.startswith("nvidia-cudnn")]
    return {
        "driver": cuda.get("driver", "not found"),
        "cuda": cuda.get("driver_supports", "not found"),
        "cudnn": cudnn[0] if cudnn else "not found",
    }


def _try(target: Target, state: Availability) -> str:
    """Builds ``y = relu(x)`` and, where the target runs here, compares its output; what went wrong, or nothing."""
    model = _relu()
    with tempfile.TemporaryDirectory(prefix="enginesmith-") as scratch:
        directory = Path(scratch) / "engine"
        directory.mkdir()
        request = BuildRequest(
            graph=_graph() if target.capabilities.consumes == "graph" else None,
            model=model,
            signature=model.signature,
            precision="fp32",
            sample=SAMPLE,
            directory=directory,
            cache=Path(scratch),
            log=lambda line: None,
            timeout_s=300,
        )
        try:
            info = target.build(request)
            if not state.run:
                return ""
            runner = target.runner(directory, info)
        except EnginesmithError as error:
            return str(error)
        try:
            result = np.asarray(runner.run(SAMPLE)["output"])
        except EnginesmithError as error:
            return str(error)
        finally:
            runner.close()
    expected = np.maximum(SAMPLE["x"], 0)
    return "" if np.array_equal(result, expected) else f"relu gave {result.tolist()} instead of {expected.tolist()}"


def _relu() -> Model:
    import torch

    from ..sources import load_model

    class Relu(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x)

    spec = TensorSpec("x", "float32", ("batch", 4))
    return load_model(Relu(), inputs=Signature((spec,), axes={"batch": AxisRange(1, 2, 4)}))


def _graph() -> Any:
    import onnx

    from ..graph import Graph

    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[batch, 4] x) => (float[batch, 4] output) { output = Relu(x) }"""
    return Graph.from_proto(onnx.parser.parse_model(text))
