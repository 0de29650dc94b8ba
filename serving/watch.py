"""Waits for something while a server is seen to live, and ends the wait where it dies or a stop is asked for."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from .requests import RequestLog
from .server import Server
from .signals import Signals

TICK_S = 0.1

Result = TypeVar("Result")
Tell = Callable[[str], None]


class StoppedError(Exception):
    """Somebody wants it to end."""


class TroubleError(Exception):
    """The server cannot go on as it is; `alive` where loading its model again may do."""

    def __init__(self, what: str, *, alive: bool) -> None:
        super().__init__(what)
        self.alive = alive


class Watch:
    """Waits beside a server. What it logs is told meanwhile.

    Args:
        model: name of the model.
        tell: takes one line of the log.

    Attributes:
        server: the one that runs; None before the first.
    """

    def __init__(self, model: str, asked: Signals, tell: Tell, requests: RequestLog | None) -> None:
        self._model, self._asked, self._tell, self._requests = model, asked, tell, requests
        self._pool = ThreadPoolExecutor(max_workers=2)
        self.server: Server | None = None

    def result(
        self, work: Callable[[], Result], *, loading: bool = False, meanwhile: Callable[[], None] = lambda: None
    ) -> Result:
        """The result of a call to the server.

        Args:
            loading: whether it has the server load its model, whose new processes are to be watched at once.
            meanwhile: called again and again; what it raises ends the wait.

        Raises:
            StoppedError, TroubleError: before the call ended.
        """
        future = self._pool.submit(work)
        while not future.done():
            self.look()
            meanwhile()
            if loading and self.server:
                self.server.watch_models()  # whose death the server does not always see before its timeout
            wait([future], timeout=TICK_S)
        return future.result()

    def pause(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Waits so long, or until something is the case.

        Raises:
            StoppedError, TroubleError: before that.
        """
        deadline = time.monotonic() + seconds
        while True:
            self.look()
            left = deadline - time.monotonic()
            if left <= 0 or until():
                return
            self._asked.wait(min(TICK_S, left))

    def look(self) -> None:
        """Raises StoppedError or TroubleError where there is reason to."""
        assert self.server is not None
        self.server.read_log(self.log)
        if self._requests:
            self._requests.read(self._tell)
        if self._asked.count:
            raise StoppedError
        if (code := self.server.code) is not None:
            why = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise TroubleError(f"the server (process {self.server.pid}) ended with {why}", alive=False)
        if pid := self.server.died():
            raise TroubleError(f"process {pid} of model {self._model!r} died", alive=True)

    def log(self, line: str) -> None:
        """Tells a line of the server's log."""
        self._tell(f"server: {line}")

    def close(self) -> None:
        """Waits for calls that still run. They end soon after the server."""
        self._pool.shutdown(cancel_futures=True)
