"""The TorchInductor worker: compiles a program that torch.export saved, loads the package and runs it once or twice.

It answers requests as `targets._worker` describes. A crash of a compiler, or of code that it made, leaves the parent
alive.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from ...errors import EngineError
from .. import _serve, get_target
from ..base import EngineInfo, Runner


def command() -> list[str]:
    """The command of the worker."""
    return _serve.command(__name__)


def save_arrays(file: Path, arrays: Iterable[np.ndarray]) -> None:
    """Writes arrays to an .npz file."""
    np.savez(file, *arrays)


def load_arrays(file: Path) -> list[np.ndarray]:
    """Reads what `save_arrays` wrote."""
    with np.load(file, allow_pickle=False) as arrays:
        return [arrays[name] for name in arrays.files]


class Commands:
    """Every public method is a command, and its arguments are the request's."""

    def __init__(self) -> None:
        self.scratch = ""
        self._runner: Runner | None = None
        self._info: EngineInfo | None = None

    def compile(
        self, programs: Mapping[str, str], scratch: str, libraries: Sequence[str], configs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Compiles exported programs, each to a package.

        Args:
            programs: file of the package, by that of the program.
            scratch: folder for intermediate files, to remove when the parent dies.
            libraries: modules that bring operators of their own.
            configs: TorchInductor's options.
        """
        self.scratch = scratch
        for library in libraries:
            importlib.import_module(library)
        import torch

        if "enginesmith" in libraries:
            from .operators import operators

            operators()

        # One cache for all workers of a build: what the first learns of compilers and kernels the others read.
        cached = mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": str(Path(scratch) / "cache")})
        with torch.no_grad(), cached:
            for program, package in programs.items():
                loaded = torch.export.load(program)
                torch._inductor.aoti_compile_and_package(loaded, package_path=package, inductor_configs=dict(configs))
        return {}

    def load(self, directory: str, info: str) -> dict[str, Any]:
        """Opens the engine in `directory`, which the engine.json in folder `info` describes."""
        self._info = EngineInfo.read(Path(info))
        self._runner = get_target(self._info.target, self._info.options).runner(Path(directory), self._info)
        return {}

    def reset(self) -> dict[str, Any]:
        """Returns the engine to its first state."""
        self._opened()[0].reset()
        return {}

    def run(self, inputs: str, outputs: str) -> dict[str, Any]:
        """Runs the engine on arrays in a file, in the signature's order; {"failed": why} where it refuses them."""
        runner, info = self._opened()
        given = {spec.name: array for spec, array in zip(info.signature.inputs, load_arrays(Path(inputs)), strict=True)}
        try:
            found = runner.run(given)
        except EngineError as error:
            return {"failed": error.message}
        save_arrays(Path(outputs), (found[spec.name] for spec in info.signature.outputs))
        return {}

    def refusal(self) -> dict[str, Any]:
        """{"reason": why the engine's calls are no CUDA graphs}, empty where they are."""
        return {"reason": getattr(self._opened()[0], "refusal", "")}

    def close(self) -> dict[str, Any]:
        """Lets go of the engine."""
        self._runner = None
        return {}

    def clean(self) -> None:
        """Removes the folder that a parent which died left behind."""
        if self.scratch:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def _opened(self) -> tuple[Runner, EngineInfo]:
        if self._runner is None or self._info is None:
            raise EngineError("no engine is loaded")
        return self._runner, self._info


def main() -> None:
    """Answers requests until the parent closes stdin."""
    commands = Commands()
    _serve.serve(commands, commands.clean)
