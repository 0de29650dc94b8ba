"""Is a model repository one that Triton takes? Asked of Triton itself, as far as there is one, before it is shipped."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from ..compiler.machine.environment import gpus
from ..errors import EngineError, TargetUnavailableError
from .config import MARK
from .endpoint import Endpoint
from .repository import Repository
from .server import Server
from .triton import Triton, find

LIMIT_S, STOP_S = 60.0, 15.0

_STUB = """\
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([]) for _ in requests]
"""
"""Stands for the model: the check is of the configuration, and the engine may be for another machine."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was checked, and why something was not; a check that fails raises.

    Attributes:
        protobuf: whether the text is one of Triton's message ModelConfig.
        server: whether a server takes it, with everything that it means.
    """

    protobuf: str
    server: str


PASSED = "passed"


def check(repository: Repository) -> Checked:
    """Checks the configuration of a model that was written.

    Raises:
        EngineError: it is refused.
    """
    return Checked(_protobuf(repository), _server(repository))


def _protobuf(repository: Repository) -> str:
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError:
        return "not checked: pip install 'tritonclient[grpc]'"
    try:
        text_format.Parse(repository.config.read_text(), model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise EngineError(f"{repository.config} is no configuration of Triton's: {error}") from error
    return PASSED


def _server(repository: Repository) -> str:
    with tempfile.TemporaryDirectory(prefix="enginesmith-check-") as scratch:
        try:
            triton = find(Path(scratch))
        except TargetUnavailableError as error:
            return f"not checked: {error.message}"
        return _loaded(triton, repository, Path(scratch))


def _loaded(triton: Triton, repository: Repository, scratch: Path) -> str:
    """Has a server load the configuration, with a stub in place of the model."""
    model = scratch / "repository" / repository.name
    (model / "1").mkdir(parents=True)
    (model / "1" / "model.py").write_text(_STUB)
    if (warmup := repository.path / repository.name / "warmup").is_dir():
        shutil.copytree(warmup, model / "warmup")
    (model / "config.pbtxt").write_text(_of_stub(repository.config.read_text()))
    endpoint = Endpoint(port=0, metrics_port=None).resolved()
    command = triton.command(
        model.parent, "--exit-on-error", "true", "--disable-auto-complete-config", port=endpoint.port
    )
    prefix = f"enginesmith_check_{os.getpid()}_"
    command += ["--backend-config", f"python,shm-region-prefix-name={prefix}"]
    server = Server(command, triton.environment, scratch / "server.log", prefix)
    try:
        said = _wait(server, scratch / "server.log")
    finally:
        server.stop(STOP_S, lambda line: None, impatient=lambda: False, healed=False)
    if problem := _problem(said, repository.name):
        raise EngineError(f"Triton {triton.version} refuses {repository.config}: {problem}")
    return f"{PASSED}, Triton {triton.version}"


def _of_stub(text: str) -> str:
    """The same for the Python backend, on the processor where there is no GPU."""
    lines = [line for line in text.splitlines() if not line.startswith(("platform:", "default_model_filename:"))]
    lines = ['backend: "python"' if line.startswith("backend:") else line for line in lines]
    if not gpus():
        lines = [re.sub(r"kind: KIND_GPU( gpus: \[.*?\])?", "kind: KIND_CPU", line) for line in lines]
    return "\n".join(line for line in lines if not line.startswith("parameters") or MARK in line) + "\n"


def _wait(server: Server, log: Path) -> str:
    """What the server logged until it is ready or has ended."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and server.code is None:
        if "Started GRPCInferenceService" in (said := log.read_text(errors="replace")):
            return said
        time.sleep(0.05)
    return log.read_text(errors="replace")


def _problem(said: str, model: str) -> str:
    """Why a server did not load a model, from its log; empty where it did."""
    if f"successfully loaded '{model}'" in said:
        return ""
    errors = [line for line in said.splitlines() if re.match(r"E\d{4} ", line)]
    found = next((line for line in errors if model in line), errors[0] if errors else "it said nothing")
    return re.sub(r'^E\d{4} \S+ \d+ \S+\] ?"?|"$', "", found).replace('\\"', '"')
