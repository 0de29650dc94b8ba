"""Keeps one server answering until it is told to stop: starts it, probes it, heals it, ends it.

start ── a real inference answers ──> watch ── SIGTERM, SIGINT ──> stop: answers what is in flight, exit code 0
                                      │   ^ └── SIGHUP ──> the bundle is read anew, see reload.py
  a model process died, or no answer  │   │  healed: a real inference answers again
                                      v   │
         the model is loaded again; where that fails, or the server died: another server, after a pause
                                      │
                                      v  after RESTARTS in a row: exit code 4, with the tail of the log
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ..errors import EngineError, EnginesmithError
from .janitor import Janitor
from .launch import Launch, Watching
from .probe import ProbeError, Prober
from .repository import Repository
from .server import Server
from .signals import Signals
from .watch import TICK_S, StoppedError, Tell, TroubleError, Watch

RESTARTS = 5
"""Servers in a row that may die or fail to answer before the supervisor gives up."""

FIRST_PAUSE_S = 0.5
STEADY_S = 60.0
"""A server that ran as long as this began well: what happens to it later is counted anew."""

HOUSEKEEPING_S = 10
"""What a server may take to unload its models, beyond answering what is in flight."""


class Reloads(Protocol):
    """What puts another bundle in the place of the one that is served; see `Reloader`."""

    def replaced(self, watch: Watch, old: Prober) -> Prober:
        """What asks the new one. Raises EnginesmithError or OSError where the old one stays."""


class Supervisor:
    """Keeps one server answering.

    Args:
        folder: for the server's log.
        prefix: of the names of the server's shared memory.
        tell: takes one line of the log.
        reloads: None where the server cannot load a model beside another.
    """

    def __init__(
        self,
        launch: Launch,
        folder: Path,
        prefix: str,
        watching: Watching,
        probe: Prober,
        janitor: Janitor,
        asked: Signals,
        tell: Tell,
        watch: Watch,
        reloads: Reloads | None = None,
    ) -> None:
        self._launch, self._folder, self._prefix, self._watching = launch, folder, prefix, watching
        self._probe, self._janitor, self._asked, self._tell, self._watch = probe, janitor, asked, tell, watch
        self._reloads = reloads
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
        except StoppedError:
            self._end()
        finally:
            if self._watch.server:
                self._watch.server.kill()
            self._janitor.watch(None)
            self._watch.close()

    def _begin(self) -> None:
        try:
            self._start()
        except TroubleError as trouble:
            raise self._given_up(f"the server did not start: {trouble}") from trouble

    def _watch_and_heal(self) -> None:
        try:
            self._probe_again_and_again()
        except TroubleError as trouble:
            self._recover(trouble)

    def _start(self) -> None:
        """Starts a server and waits for a real inference."""
        launch = self._launch
        self._watch.server = Server(launch.command, launch.environment, self._folder / "server.log", self._prefix)
        self._janitor.watch(self._watch.server.pid)
        self._healed = self._answers = False
        self._wait_for_answer(self._watching.start_s)

    def _wait_for_answer(self, within_s: float) -> None:
        assert self._watch.server is not None
        deadline = time.monotonic() + within_s
        while True:
            try:
                self._watch.result(lambda: self._probe(self._watching.timeout_s))
                break
            except ProbeError as error:
                if error.wrong or time.monotonic() > deadline:
                    raise TroubleError(error.message, alive=False) from error
                self._watch.pause(TICK_S)
        self._watch.server.watch_models()
        self._answers = True
        self._steady_from = time.monotonic() + STEADY_S

    def _probe_again_and_again(self) -> None:
        """At every interval, and reloads when that is asked for; ends by an exception only."""
        while True:
            self._watch.pause(self._watching.interval_s, until=lambda: self._asked.reload)
            if self._asked.reload:
                self._asked.reload = False
                self._reload()
                continue
            if time.monotonic() > self._steady_from:
                self._failures = 0
            done = self._watch.result(self._probe.done)
            try:
                self._watch.result(lambda: self._probe(self._watching.timeout_s))
            except ProbeError as error:
                if not (error.busy and self._goes_on(done)):
                    raise TroubleError(f"no right answer to a probe: {error.message}", alive=True) from error

    def _goes_on(self, done: int) -> bool:
        """Whether others are answered meanwhile."""
        deadline = time.monotonic() + self._watching.timeout_s
        while (now := self._watch.result(self._probe.done)) in (done, -1):
            if time.monotonic() > deadline:
                return False
            self._watch.pause(TICK_S)
        return now != done

    def _recover(self, trouble: TroubleError) -> None:
        """Loads the model again or starts another server, until a real inference answers."""
        since = time.monotonic()
        while True:
            self._tell(f"trouble: {trouble}")
            try:
                if trouble.alive and self._launch.repository:
                    self._load_again(self._launch.repository)
                else:
                    self._start_another()
                break
            except TroubleError as next_one:
                trouble = TroubleError(str(next_one), alive=False)  # loading again is tried once
        self._tell(f"recovered: a real inference answers again after {time.monotonic() - since:.1f} s")

    def _load_again(self, repository: Repository) -> None:
        assert self._watch.server is not None
        self._watch.server.kill_models()
        repository.touch()
        self._healed = True
        try:
            self._watch.result(lambda: self._probe.load(self._watching.start_s), loading=True)
        except ProbeError as error:
            raise TroubleError(f"the model could not be loaded again: {error.message}", alive=False) from error
        self._wait_for_answer(self._watching.timeout_s)

    def _reload(self) -> None:
        since = time.monotonic()
        try:
            if self._reloads is None:
                raise EngineError(f"{self._launch.what} loads no model beside another: stop it and start it again")
            self._probe = self._replaced(self._reloads)
        except TroubleError:
            self._tell("not reloaded: there was trouble meanwhile; ask again once it has recovered")
            raise
        except (EnginesmithError, OSError) as error:
            self._tell(f"not reloaded, what was served goes on: {' '.join(str(error).split())}")
        else:
            self._tell(f"reloaded: {self._reloads} answers after {time.monotonic() - since:.1f} s")

    def _replaced(self, reloads: Reloads) -> Prober:
        try:
            return reloads.replaced(self._watch, self._probe)
        except (EnginesmithError, OSError) as error:
            self._watch.look()  # the server may have died, which says more
            self._healed |= isinstance(error, ProbeError)
            raise

    def _start_another(self) -> None:
        assert self._watch.server is not None
        self._watch.server.kill()
        self._janitor.watch(None)
        self._answers = False
        self._failures += 1
        if self._failures > RESTARTS:
            raise self._given_up(f"gave up: {self._failures} servers in a row failed")
        pause_s = FIRST_PAUSE_S * 2 ** (self._failures - 1)
        self._tell(f"starting another server in {pause_s:.1f} s ({self._failures} of {RESTARTS})")
        if self._asked.wait(pause_s):
            raise StoppedError
        self._start()

    def _end(self) -> None:
        assert self._watch.server is not None
        if not self._answers:
            self._tell("stopped before it answered its first request")
            return
        self._tell("stopping: takes no new requests, answers those in flight")
        began = time.monotonic()
        grace_s = self._watching.drain_s + HOUSEKEEPING_S
        drained = self._watch.server.stop(
            grace_s, self._watch.log, impatient=lambda: self._asked.count > 1, healed=self._healed
        )
        self._janitor.watch(None)
        if self._asked.count > 1:
            raise EngineError("stopped at once, as was asked for a second time; requests in flight got no answer")
        if not drained:
            raise EngineError(
                f"requests in flight got no answer within {self._watching.drain_s:g} s",
                found=self._watch.server.tail(),
                hint="give them longer with --drain-s",
            )
        self._tell(f"stopped: all requests were answered, after {time.monotonic() - began:.1f} s")

    def _given_up(self, what: str) -> EngineError:
        assert self._watch.server is not None
        self._watch.server.kill()
        return EngineError(what, found=f"the end of its log:\n{self._watch.server.tail()}", hint="enginesmith doctor")
