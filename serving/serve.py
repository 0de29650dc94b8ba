"""Serves a bundle until it is told to stop, and leaves nothing behind: no process, shared memory or folder."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from .endpoint import Endpoint
from .janitor import Janitor
from .launch import Watching, prepare
from .probe import Probe
from .reload import Reloader
from .requests import RequestLog
from .settings import Serving
from .signals import collected
from .supervisor import HOUSEKEEPING_S, Supervisor
from .watch import Tell, Watch


def serve(
    bundle: Path,
    settings: Serving,
    endpoint: Endpoint,
    watching: Watching,
    *,
    tell: Tell,
    ready: Callable[[str, str, Endpoint], None],
) -> None:
    """Serves a bundle until SIGTERM or SIGINT, and what came into its place at SIGHUP.

    Args:
        tell: takes one line of the log.
        ready: called once, when a real inference has answered, with the names of model and server and the real ports.

    Raises:
        UsageError: no bundle, a port that is taken, TLS files that do not fit.
        TargetUnavailableError: no server can run here.
        EngineError: the server does not start, died too often, or did not answer all that was in flight at the end.
    """
    prefix = f"enginesmith_{os.getpid()}_"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"enginesmith-serve-{os.getpid()}-")))
        janitor = stack.enter_context(Janitor(folder, prefix, watching.drain_s + HOUSEKEEPING_S))
        asked = stack.enter_context(collected())
        endpoint = endpoint.resolved()
        requests = None
        if watching.requests:
            (folder / "requests").mkdir()
            requests = RequestLog(folder / "requests", watching.requests)
        launch = prepare(bundle, folder, settings, endpoint, watching, requests, prefix, tell)
        probe = Probe(bundle, launch.model, endpoint, launch.engine)
        reloads = None
        if launch.repository:
            reloads = Reloader(bundle, launch.repository, settings, endpoint, watching)
        watch = Watch(launch.model, asked, tell, requests)
        supervisor = Supervisor(launch, folder, prefix, watching, probe, janitor, asked, tell, watch, reloads)
        supervisor.run(lambda: ready(launch.model, launch.what, endpoint))
