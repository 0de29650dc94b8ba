"""The TorchInductor worker: compiles a program that torch.export saved, loads the package and runs it once or twice.

It answers requests as `targets._worker` describes. A crash of a compiler, or of code that it made, leaves the parent
alive.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import shutil
import sys
import threading
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ...errors import EngineError
from .. import get_target
from ..base import EngineInfo, Runner

_START = "import sys; sys.path[:] = sys.argv[1:]; from {module} import main; main()"


def command() -> list[str]:
    """The command of the worker: this interpreter, which finds the same modules."""
    return [sys.executable, "-c", _START.format(module=__name__), *sys.path]


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
        self, program: str, package: str, scratch: str, libraries: Sequence[str], configs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Compiles the exported `program` to a `package`.

        Args:
            scratch: folder for intermediate files, to remove when the parent dies.
            libraries: modules that bring operators of their own.
            configs: TorchInductor's options.
        """
        self.scratch = scratch
        for library in libraries:
            importlib.import_module(library)
        import torch
        from torch._inductor.utils import fresh_cache

        with torch.no_grad(), fresh_cache(dir=scratch):
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

    def close(self) -> dict[str, Any]:
        """Lets go of the engine."""
        self._runner = None
        return {}

    def _opened(self) -> tuple[Runner, EngineInfo]:
        if self._runner is None or self._info is None:
            raise EngineError("no engine is loaded")
        return self._runner, self._info


def main() -> None:
    """Answers requests until the parent closes stdin; an error is answered, and ends the process."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what compilers print must not reach the channel
    sys.stdout = sys.stderr
    commands = Commands()

    def fail(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        from ...compiler.sources.guard import first_line

        traceback.print_exception(kind, error, trace)
        message = error.message if isinstance(error, EngineError) else first_line(error)
        _answer(channel, "error", {"kind": "failed", "message": message})
        sys.stderr.flush()
        os._exit(1)  # an orderly exit would wait for the thread that reads stdin

    sys.excepthook = fail
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(requests, commands), daemon=True).start()
    while True:
        request = requests.get()
        _answer(channel, "result", getattr(commands, request.pop("command"))(**request))


def _answer(channel: TextIO, kind: str, value: Any) -> None:
    channel.write(json.dumps({kind: value}) + "\n")
    channel.flush()


def _listen(requests: queue.Queue[dict[str, Any]], commands: Commands) -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    if commands.scratch:
        shutil.rmtree(commands.scratch, ignore_errors=True)
    os._exit(1)  # the parent is gone, and the main thread may be deep in a compiler
