"""What a server is started with, for a Triton or for the fallback."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..compiler.engine import read_manifest
from ..compiler.machine.environment import gpus
from ..errors import TargetUnavailableError
from . import fallback
from .endpoint import Endpoint
from .repository import Repository, export
from .requests import RequestLog
from .settings import STALLS, Serving
from .triton import Triton, find


@dataclasses.dataclass(frozen=True)
class Watching:
    """How a server is watched.

    Attributes:
        interval_s: between two probes.
        timeout_s: how long a probe may take.
        start_s: how long the server, or a model, may take until a real inference answers.
        drain_s: how long answering what is in flight may take when it is told to stop.
        requests: one in as many requests is logged with its id and times; None for none.
    """

    interval_s: float = 5.0
    timeout_s: float = 10.0
    start_s: float = 300.0
    drain_s: float = 30.0
    requests: int | None = None


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a server is started.

    Attributes:
        what: the server, for people.
        model: name of the model on it.
        engine: that is served; None for the bundle's best.
        repository: from which the server can load the model again; None where it cannot.
    """

    what: str
    model: str
    command: Sequence[str]
    environment: Mapping[str, str]
    engine: str | None = None
    repository: Repository | None = None


def prepare(
    bundle: Path,
    folder: Path,
    settings: Serving,
    endpoint: Endpoint,
    watching: Watching,
    requests: RequestLog | None,
    prefix: str,
    tell: Callable[[str], None],
) -> Launch:
    """Exports a bundle to `folder` for the server that can run here.

    Raises:
        TargetUnavailableError: none can.
    """
    try:
        triton = find(folder)
    except TargetUnavailableError as error:
        launch = _fallback(bundle, settings, endpoint, watching, error)
        tell(f"warning: {error.message} ({error.found}); {fallback.NOTE}")
        if ignored := settings.of_triton():
            options = ", ".join(f"--{name.replace('_', '-')}" for name in ignored)
            tell(f"warning: {fallback.PACKAGE} takes no notice of {options}")
        return launch
    repository = export(bundle, folder / "repository", settings, link=True)
    if repository.merged and settings.stalls:
        tell(f"warning: {STALLS}")
    return _triton(triton, repository, endpoint, watching, requests, prefix)


def _triton(
    triton: Triton,
    repository: Repository,
    endpoint: Endpoint,
    watching: Watching,
    requests: RequestLog | None,
    prefix: str,
) -> Launch:
    flags = [*endpoint.flags(), "--model-control-mode", "explicit", "--load-model", repository.name]
    flags += ["--disable-auto-complete-config"]  # the configuration is complete, and asking for more starts twice
    flags += ["--backend-config", f"python,shm-region-prefix-name={prefix}"]
    flags += ["--exit-timeout-secs", str(math.ceil(watching.drain_s))]
    if requests:
        flags += requests.flags()
    flags += ["--strict-readiness", "false"]  # a model that is tried beside the one that is served is not ready at once
    if not gpus():
        flags += ["--pinned-memory-pool-byte-size", "0", "--allow-gpu-metrics", "false"]
    command = triton.command(
        repository.path,
        *flags,
        address=endpoint.host,
        port=endpoint.port,
        metrics_address=endpoint.metrics_host,
        metrics_port=endpoint.metrics_port,
        http_port=endpoint.http_port,
    )
    what = f"Triton {triton.version} ({triton.origin})"
    return Launch(what, repository.name, command, triton.environment, repository.engine, repository)


def _fallback(
    bundle: Path, settings: Serving, endpoint: Endpoint, watching: Watching, reason: TargetUnavailableError
) -> Launch:
    if not fallback.is_installed() or endpoint.exposed or endpoint.http_port is not None:
        raise reason
    if read_manifest(bundle)["signature"].get("states"):
        reason.hint = f"{fallback.PACKAGE} cannot send the tokens of a language model one by one"
        raise reason
    name = settings.name or bundle.absolute().name
    command = fallback.command(bundle, name, settings.engine, settings.max_queue, watching.drain_s, endpoint)
    return Launch(f"{fallback.PACKAGE}, without merging", name, command, fallback.environment(), settings.engine)
