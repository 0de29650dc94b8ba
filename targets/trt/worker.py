"""The TensorRT worker: builds and runs engines in a process of its own, under another interpreter perhaps.

``python worker.py tensorrt|tensorrt_rtx`` takes requests as lines of JSON on stdin and answers in lines on
stdout; whatever libraries print goes to stderr:

    {"command": "build", "onnx": ...}    {"progress": [0.4, "Timing tactics"]}, then {"result": ...} or {"error": ...}

It needs NumPy and TensorRT or TensorRT-RTX, and Polygraphy to build; Python 3.8 will do. It ends with its parent: when
stdin closes so does the process, whatever it is doing.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import queue
import shutil
import sys
import threading
import traceback
import types
from collections.abc import Mapping
from typing import Any, TextIO

import numpy as np

if not __package__:  # a script, whose interpreter may lack enginesmith: its folder is a package by itself
    _folder = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder) != _folder]
    __package__ = "enginesmith_trt"
    sys.modules[__package__] = types.ModuleType(__package__)
    sys.modules[__package__].__path__ = [_folder]

from .binding import Binding
from .builder import build
from .driver import Failure, gpu
from .layers import engine_layers
from .session import Session


def versions(module: str) -> dict[str, Any]:
    """What this interpreter has and the GPU that it sees; "error" says why TensorRT cannot be imported."""
    found: dict[str, Any] = {"python": sys.version.split()[0], "version": None, "polygraphy": None, "error": None}
    try:
        found["version"] = importlib.import_module(module).__version__
        found["polygraphy"] = importlib.import_module("polygraphy").__version__
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return {**found, **gpu()}


def save_arrays(folder: str, stem: str, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Writes arrays as .npy files, and returns the file of each."""
    files = {}
    for index, (name, array) in enumerate(arrays.items()):
        files[name] = os.path.join(folder, f"{stem}-{index}.npy")
        np.save(files[name], array, allow_pickle=False)
    return files


def load_arrays(files: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Reads what `save_arrays` wrote."""
    return {name: np.load(file, allow_pickle=False) for name, file in files.items()}


class Worker:
    """The commands: every public method is one, and its arguments are the request's."""

    def __init__(self, module: str, channel: TextIO) -> None:
        self._module = module
        self._channel = channel
        self._session: Session | None = None
        self._bindings: dict[int, Binding] = {}
        self._scratch = ""

    def versions(self) -> dict[str, Any]:
        """See the function of that name."""
        return versions(self._module)

    def build(self, scratch: str, **request: Any) -> dict[str, Any]:
        """See `builder.build`; `scratch` is a folder to remove when the parent dies, as in `load`."""
        self._scratch = scratch
        return build(module=self._module, report=lambda *progress: self.answer("progress", progress), **request)

    def load(self, plan: str, scratch: str, cuda_graph: bool, runtime_cache: str | None, device: int) -> dict[str, Any]:
        """Opens an engine; `scratch` is a folder for arrays."""
        self._scratch = scratch
        self._session = Session(importlib.import_module(self._module), plan, cuda_graph, runtime_cache, device)
        return {"inputs": self._session.inputs, "outputs": self._session.outputs}

    def run(self, files: Mapping[str, str]) -> dict[str, str]:
        """Runs on arrays in files, and returns the files of the outputs."""
        return save_arrays(self._scratch, "output", self._opened().run(load_arrays(files)))

    def bind(self, files: Mapping[str, str], release: list[int]) -> dict[str, Any]:
        """Copies inputs to the device for the commands below, and frees older bindings by number."""
        inputs, session = load_arrays(files), self._opened()
        with session.active():
            for number in release:
                self._bindings.pop(number).close()
            binding = Binding(session, inputs)
            binding.put(inputs)
        number = max(self._bindings, default=0) + 1
        self._bindings[number] = binding
        return {"binding": number}

    def launch(self, binding: int) -> dict[str, Any]:
        """Runs once on what `bind` copied, until the device is done."""
        with self._opened().active():
            self._bindings[binding].launch()
            self._bindings[binding].synchronize()
        return {}

    def timed(self, binding: int, iterations: int) -> dict[str, Any]:
        """Milliseconds on host and device of runs on what `bind` copied, and why there is no CUDA graph."""
        with self._opened().active():
            host, device = self._bindings[binding].timed(iterations)
        return {"host": host, "device": device, "graph_refusal": self._bindings[binding].graph_refusal}

    def profile(self, binding: int, iterations: int) -> dict[str, Any]:
        """Milliseconds of each layer in each run on what `bind` copied, which takes no launches afterwards."""
        with self._opened().active():
            runs = self._bindings[binding].profile(iterations)
        return {"runs": runs, "layers": engine_layers(self._opened().trt, self._opened().engine)}

    def fetch(self, binding: int) -> dict[str, str]:
        """Files of the outputs of the last run on what `bind` copied."""
        with self._opened().active():
            return save_arrays(self._scratch, "output", self._bindings[binding].fetch())

    def close(self) -> dict[str, Any]:
        """Gives the GPU's memory back."""
        if self._session is not None:
            with self._session.active():
                for binding in self._bindings.values():
                    binding.close()
            self._session.close()
            self._session = None
        return {}

    def answer(self, kind: str, value: Any) -> None:
        """Writes one line to the parent."""
        self._channel.write(json.dumps({kind: value}) + "\n")
        self._channel.flush()

    def clean(self) -> None:
        """Removes the folder that a parent which died left behind."""
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _opened(self) -> Session:
        if self._session is None:
            raise Failure("failed", "no engine is loaded")
        return self._session


def main(module: str) -> None:
    """Answers requests until the parent closes stdin. An error that nobody foresaw is answered and ends the process."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what native libraries print must not reach the channel
    sys.stdout = sys.stderr
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(module == "tensorrt_rtx"))  # read as Polygraphy is imported
    worker = Worker(module, channel)

    def report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        traceback.print_exception(kind, error, trace)
        worker.answer("error", {"kind": "failed", "message": f"{kind.__name__}: {error}"})
        sys.stderr.flush()
        os._exit(1)  # an orderly exit would wait for the thread that reads stdin

    sys.excepthook = report
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(requests, worker), daemon=True).start()
    while True:
        request = requests.get()
        try:
            result = getattr(worker, request.pop("command"))(**request)
            worker.answer("result", result)
        except Failure as failure:
            worker.answer("error", {"kind": failure.kind, "message": str(failure)})
        except OSError as error:
            kind = "storage" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "failed"
            worker.answer("error", {"kind": kind, "message": str(error)})


def _listen(requests: queue.Queue[dict[str, Any]], worker: Worker) -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    worker.clean()
    os._exit(1)  # the parent is gone, and the main thread may be deep in a build


if __name__ == "__main__":
    main(sys.argv[1])
