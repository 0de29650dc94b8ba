"""Profiles an ONNX Runtime engine of the CUDA provider in a process of its own, whose launches block.

ONNX Runtime's profiler times a node on the host, where launching a kernel takes microseconds whatever the kernel does.
With CUDA_LAUNCH_BLOCKING=1, which CUDA reads once a process, a launch lasts until its kernel is done.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from ...errors import EngineError
from ..base import Arrays, EngineInfo
from ..profile import LayerTime, Profile

TIMEOUT_S = 600.0

NOTE = "each node was timed until its kernels were done, which hides that launches overlap with kernels"

_START = "import sys; sys.path[:] = sys.argv[5:]; from {module} import main; main(*sys.argv[1:5])"


def profile(directory: Path, info: EngineInfo, inputs: Arrays) -> Profile:
    """The layers of an engine.

    Raises:
        EngineError: the process failed, with the end of what it said.
    """
    with tempfile.TemporaryDirectory(prefix="enginesmith-") as folder:
        given, found, about = (Path(folder) / name for name in ("inputs.npz", "profile.json", "about"))
        about.mkdir()
        info.write(about)
        np.savez(given, *(inputs[spec.name] for spec in info.signature.inputs))
        try:
            run = subprocess.run(
                [*command(), str(directory), str(about), str(given), str(found), *sys.path],
                env={**os.environ, "CUDA_LAUNCH_BLOCKING": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise EngineError(
                f"engine {info.name} could not be profiled", found=f"no end after {TIMEOUT_S:g} s"
            ) from error
        if run.returncode or not found.exists():
            said = (run.stderr.strip().splitlines() or ["nothing"])[-1]
            raise EngineError(f"engine {info.name} could not be profiled", found=f"exit code {run.returncode}: {said}")
        return _read(found)


def command() -> list[str]:
    """This interpreter, which finds the same modules."""
    return [sys.executable, "-c", _START.format(module=__name__)]


def main(directory: str, about: str, given: str, found: str) -> None:
    """Profiles in this process, and leaves the result in the file `found`."""
    from .. import get_target
    from .._onnxruntime_profile import profile as run
    from ..onnxruntime_cuda import OnnxRuntimeCuda

    info = EngineInfo.read(Path(about))
    target = get_target(info.target, info.options)
    assert isinstance(target, OnnxRuntimeCuda)
    try:
        with np.load(given, allow_pickle=False) as arrays:
            inputs = {spec.name: arrays[f"arr_{place}"] for place, spec in enumerate(info.signature.inputs)}
            made = run(Path(directory) / info.entry, target.session(info), inputs)
    except EngineError as error:
        sys.exit(error.message)
    Path(found).write_text(json.dumps(dataclasses.asdict(made)))


def _read(found: Path) -> Profile:
    value = json.loads(found.read_text())
    layers = tuple(
        LayerTime(**{**layer, "nodes": tuple(layer["nodes"]), "outputs": tuple(layer["outputs"])})
        for layer in value.pop("layers")
    )
    shapes = {name: tuple(shape) for name, shape in value.pop("shapes").items()}
    return Profile(**{**value, "layers": layers, "shapes": shapes, "notes": (*value["notes"], NOTE)})
