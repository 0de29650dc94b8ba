"""Keeps one server answering until it is told to stop: starts it, probes it, heals it, ends it.

start ── a real inference answers ──> watch ── SIGTERM, SIGINT ──> stop: answers what is in flight, exit code 0
                                      │   ^
  a model process died, or no answer  │   │  healed: a real inference answers again
                                      v   │
         the model is loaded again; where that fails, or the server died: another server, after a pause
                                      │
                                      v  after RESTARTS in a row: exit code 4, with the tail of the log
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol, TypeVar

from ..errors import EngineError
from .janitor import Janitor
from .launch import Launch, Watching
from .probe import ProbeError
from .requests import RequestLog
from .server import Server
from .signals import StopSignals

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


class _StoppedError(Exception):
    """Somebody wants it to end."""


class _TroubleError(Exception):
    """The server cannot go on as it is; `alive` where loading its model again may do."""

    def __init__(self, what: str, *, alive: bool) -> None:
        super().__init__(what)
        self.alive = alive


class Prober(Protocol):
    """What asks the server; see `Probe`."""

    def __call__(self, timeout_s: float) -> None:
        """Raises ProbeError where no answer comes, or a wrong one."""

    def done(self) -> int:
        """How many requests were answered; -1 where it cannot be told."""

    def load(self, timeout_s: float) -> None:
        """Has the server load the model again."""


class Supervisor:
    """Keeps one server answering.

    Args:
        folder: for the server's log.
        prefix: of the names of the server's shared memory.
        tell: takes one line of the log.
    """

    def __init__(
        self,
        launch: Launch,
        folder: Path,
        prefix: str,
        watching: Watching,
        probe: Prober,
        janitor: Janitor,
        stop: StopSignals,
        tell: Tell,
        requests: RequestLog | None = None,
    ) -> None:
        self._launch, self._folder, self._prefix, self._watching = launch, folder, prefix, watching
        self._probe, self._janitor, self._stop, self._tell, self._requests = probe, janitor, stop, tell, requests
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
        launch = self._launch
        self._server = Server(launch.command, launch.environment, self._folder / "server.log", self._prefix)
        self._janitor.watch(self._server.pid)
        self._healed = self._answers = False
        self._wait_for_answer(self._watching.start_s)

    def _wait_for_answer(self, within_s: float) -> None:
        assert self._server is not None
        deadline = time.monotonic() + within_s
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
                if trouble.alive and self._launch.config:
                    self._load_again(self._launch.config)
                else:
                    self._start_another()
                break
            except _TroubleError as next_one:
                trouble = _TroubleError(str(next_one), alive=False)  # loading again is tried once
        self._tell(f"recovered: a real inference answers again after {time.monotonic() - since:.1f} s")

    def _load_again(self, config: Path) -> None:
        assert self._server is not None
        self._server.kill_models()
        os.utime(config)  # a model whose files did not change would be left as it is
        self._healed = True
        try:
            self._while_it_runs(lambda: self._probe.load(self._watching.start_s), loading=True)
        except ProbeError as error:
            raise _TroubleError(f"the model could not be loaded again: {error.message}", alive=False) from error
        self._wait_for_answer(self._watching.timeout_s)

    def _start_another(self) -> None:
        assert self._server is not None
        self._server.kill()
        self._janitor.watch(None)
        self._answers = False
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
            raise _TroubleError(f"process {pid} of model {self._launch.model!r} died", alive=True)

    def _log(self, line: str) -> None:
        self._tell(f"server: {line}")

    def _given_up(self, what: str) -> EngineError:
        assert self._server is not None
        self._server.kill()
        return EngineError(what, found=f"the end of its log:\n{self._server.tail()}", hint="enginesmith doctor")
