"""Signals that ask for an orderly end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


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
def stop_signals() -> Iterator[StopSignals]:
    """Collects SIGTERM, SIGINT and SIGHUP instead of ending this process; once left, all is as before."""
    stop = StopSignals()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: stop.add()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
