"""Serves a bundle until it is told to stop: starts a server, probes it, heals it, and leaves nothing behind.

start ── a real inference answers ──> watch ── SIGTERM, SIGINT ──> stop: answers what is in flight, exit code 0
                                      │   ^
  a model process died, or no answer  │   │  healed: a real inference answers again
                                      v   │
         the model is loaded again; where that fails, or the server died: another server, after a pause
                                      │
                                      v  after RESTARTS in a row: exit code 4, with the tail of the log
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from ..compiler.machine.environment import gpus
from ..errors import EngineError
from .endpoint import Endpoint
from .janitor import Janitor
from .probe import Probe, ProbeError
from .repository import Repository, export
from .requests import RequestLog
from .server import Server
from .settings import Serving
from .triton import Triton, find

RESTARTS = 5
"""Servers in a row that may die or fail to answer before the supervisor gives up."""

FIRST_PAUSE_S = 0.5
STEADY_S = 60.0
"""A server that ran as long as this began well: what happens to it later is counted anew."""

TICK_S = 0.1
HOUSEKEEPING_S = 10
"""What a server may take to unload its models, beyond answering what is in flight."""

Result = TypeVar("Result")
Tell = Callable[[str], None]


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


class _StoppedError(Exception):
    """Somebody wants it to end."""


class _TroubleError(Exception):
    """The server cannot go on as it is; `alive` where loading its model again may do."""

    def __init__(self, what: str, *, alive: bool) -> None:
        super().__init__(what)
        self.alive = alive


def serve(
    bundle: Path,
    settings: Serving,
    endpoint: Endpoint,
    watching: Watching,
    *,
    tell: Tell,
    ready: Callable[[str, str, Endpoint], None],
) -> None:
    """Serves a bundle until SIGTERM or SIGINT.

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
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="enginesmith-serve-")))
        janitor = stack.enter_context(Janitor(folder, prefix, watching.drain_s + HOUSEKEEPING_S))
        stop = stack.enter_context(_stop_signals())
        endpoint = endpoint.resolved()
        triton = find(folder)
        repository = export(bundle, folder / "repository", settings)
        probe = Probe(bundle, repository.name, endpoint, settings.engine)
        supervisor = Supervisor(triton, repository, endpoint, watching, probe, prefix, janitor, stop, tell)
        supervisor.run(lambda: ready(repository.name, f"Triton {triton.version} ({triton.origin})", endpoint))


class Supervisor:
    """Keeps one server answering; see `serve`."""

    def __init__(
        self,
        triton: Triton,
        repository: Repository,
        endpoint: Endpoint,
        watching: Watching,
        probe: Probe,
        prefix: str,
        janitor: Janitor,
        stop: StopSignals,
        tell: Tell,
    ) -> None:
        self._triton, self._repository, self._endpoint, self._watching = triton, repository, endpoint, watching
        self._probe, self._prefix, self._janitor, self._stop, self._tell = probe, prefix, janitor, stop, tell
        self._requests: RequestLog | None = None
        if watching.requests:
            folder = repository.path.parent / "requests"
            folder.mkdir()
            self._requests = RequestLog(folder, watching.requests)
        self._pool = ThreadPoolExecutor(max_workers=2)
        self._server: Server | None = None
        self._healed = self._answers = False
        self._failures = 0
        self._steady_from = 0.0

    def run(self, ready: Callable[[], None]) -> None:
        """Starts, watches and heals until it is told to stop."""
        try:
            self._begin()
            ready()
            while True:
                self._watch_and_heal()
        except _StoppedError:
            self._end()
        finally:
            if self._server:
                self._server.kill()
            self._janitor.watch(None)
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self) -> None:
        try:
            self._start()
        except _TroubleError as trouble:
            raise self._given_up(f"the server did not start: {trouble}") from trouble

    def _watch_and_heal(self) -> None:
        try:
            self._watch()
        except _TroubleError as trouble:
            self._recover(trouble)

    def _start(self) -> None:
        """Starts a server and waits for a real inference."""
        listens = self._endpoint
        flags = [*listens.flags(), "--model-control-mode", "explicit", "--load-model", self._repository.name]
        flags += ["--disable-auto-complete-config"]  # the configuration is complete, and asking for more starts twice
        flags += ["--exit-timeout-secs", str(int(self._watching.drain_s))]
        if self._requests:
            flags += self._requests.flags()
        if not gpus():
            flags += ["--pinned-memory-pool-byte-size", "0", "--allow-gpu-metrics", "false"]
        command = self._triton.command(
            self._repository.path,
            *flags,
            address=listens.host,
            port=listens.port,
            metrics_address=listens.metrics_host,
            metrics_port=listens.metrics_port,
            http_port=listens.http_port,
        )
        log = self._repository.path.parent / "server.log"
        self._server = Server(command, self._triton.environment, log, self._prefix)
        self._janitor.watch(self._server.pid)
        self._healed = self._answers = False
        self._wait_for_answer()

    def _wait_for_answer(self) -> None:
        assert self._server is not None
        deadline = time.monotonic() + self._watching.start_s
        while True:
            try:
                self._while_it_runs(lambda: self._probe(self._watching.timeout_s))
                break
            except ProbeError as error:
                if error.wrong or time.monotonic() > deadline:
                    raise _TroubleError(error.message, alive=False) from error
                self._pause(TICK_S)
        self._server.watch_models()
        self._answers = True
        self._steady_from = time.monotonic() + STEADY_S

    def _watch(self) -> None:
        """Probes at every interval; ends by an exception only."""
        while True:
            self._pause(self._watching.interval_s)
            if time.monotonic() > self._steady_from:
                self._failures = 0
            done = self._while_it_runs(self._probe.done)
            try:
                self._while_it_runs(lambda: self._probe(self._watching.timeout_s))
            except ProbeError as error:
                if not (error.busy and self._goes_on(done)):
                    raise _TroubleError(f"no right answer to a probe: {error.message}", alive=True) from error

    def _goes_on(self, done: int) -> bool:
        """Whether others are answered meanwhile."""
        deadline = time.monotonic() + self._watching.timeout_s
        while (now := self._while_it_runs(self._probe.done)) in (done, -1):
            if time.monotonic() > deadline:
                return False
            self._pause(TICK_S)
        return now != done

    def _recover(self, trouble: _TroubleError) -> None:
        """Loads the model again or starts another server, until a real inference answers."""
        since = time.monotonic()
        while True:
            self._tell(f"trouble: {trouble}")
            try:
                if trouble.alive:
                    self._load_again()
                else:
                    self._start_another()
                break
            except _TroubleError as next_one:
                trouble = _TroubleError(str(next_one), alive=False)  # loading again is tried once
        self._tell(f"recovered: a real inference answers again after {time.monotonic() - since:.1f} s")

    def _load_again(self) -> None:
        assert self._server is not None
        self._server.kill_models()
        config = self._repository.path / self._repository.name / "config.pbtxt"
        os.utime(config)  # a model whose files did not change would be left as it is
        self._healed = True
        try:
            self._while_it_runs(lambda: self._probe.load(self._watching.start_s), loading=True)
        except ProbeError as error:
            raise _TroubleError(f"the model could not be loaded again: {error.message}", alive=False) from error
        self._wait_for_answer()

    def _start_another(self) -> None:
        assert self._server is not None
        self._server.kill()
        self._janitor.watch(None)
        self._failures += 1
        if self._failures > RESTARTS:
            raise self._given_up(f"gave up: {self._failures} servers in a row failed")
        pause_s = FIRST_PAUSE_S * 2 ** (self._failures - 1)
        self._tell(f"starting another server in {pause_s:.1f} s ({self._failures} of {RESTARTS})")
        if self._stop.wait(pause_s):
            raise _StoppedError
        self._start()

    def _end(self) -> None:
        assert self._server is not None
        if not self._answers:
            self._tell("stopped before it answered its first request")
            return
        self._tell("stopping: takes no new requests, answers those in flight")
        began = time.monotonic()
        grace_s = self._watching.drain_s + HOUSEKEEPING_S
        drained = self._server.stop(grace_s, self._log, impatient=lambda: self._stop.count > 1, healed=self._healed)
        self._janitor.watch(None)
        if self._stop.count > 1:
            raise EngineError("stopped at once, as was asked for a second time; requests in flight got no answer")
        if not drained:
            raise EngineError(
                f"requests in flight got no answer within {self._watching.drain_s:g} s",
                found=self._server.tail(),
                hint="give them longer with --drain-s",
            )
        self._tell(f"stopped: all requests were answered, after {time.monotonic() - began:.1f} s")

    def _while_it_runs(self, work: Callable[[], Result], *, loading: bool = False) -> Result:
        """The result of a call to the server, unless a stop is asked for or the server or a model dies before."""
        future = self._pool.submit(work)
        while not future.done():
            self._look()
            if loading and self._server:
                self._server.watch_models()  # whose death the server does not always see before its timeout
            wait([future], timeout=TICK_S)
        return future.result()

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            self._look()
            left = deadline - time.monotonic()
            if left <= 0 or self._stop.wait(min(TICK_S, left)):
                self._look()
                return

    def _look(self) -> None:
        assert self._server is not None
        self._server.read_log(self._log)
        if self._requests:
            self._requests.read(self._tell)
        if self._stop.count:
            raise _StoppedError
        if (code := self._server.code) is not None:
            why = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise _TroubleError(f"the server (process {self._server.pid}) ended with {why}", alive=False)
        if pid := self._server.died():
            raise _TroubleError(f"process {pid} of model {self._repository.name!r} died", alive=True)

    def _log(self, line: str) -> None:
        self._tell(f"triton: {line}")

    def _given_up(self, what: str) -> EngineError:
        assert self._server is not None
        self._server.kill()
        return EngineError(what, found=f"the end of its log:\n{self._server.tail()}", hint="enginesmith doctor")


class StopSignals:
    """How often a stop was asked for."""

    def __init__(self) -> None:
        self.count = 0
        self._event = threading.Event()

    def add(self) -> None:
        """Notes one more."""
        self.count += 1
        self._event.set()

    def wait(self, seconds: float) -> bool:
        """Waits for the first; gives whether it came."""
        return self._event.wait(seconds)


@contextlib.contextmanager
def _stop_signals() -> Iterator[StopSignals]:
    stop = StopSignals()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: stop.add()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
