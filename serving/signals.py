"""Signals that ask for an orderly end, or for the bundle to be read anew."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

_TERMINAL = "/dev/tty"


class Signals:
    """How often a stop was asked for, and whether a reload is."""

    def __init__(self) -> None:
        self.count = 0
        self.reload = False
        self._event = threading.Event()

    def add(self) -> None:
        """Notes one more that asks for a stop."""
        self.count += 1
        self._event.set()

    def add_reload(self) -> None:
        """Notes one that asks for a reload. Several before it begins are one."""
        self.reload = True

    def wait(self, seconds: float) -> bool:
        """Waits for the first stop; gives whether it came."""
        return self._event.wait(seconds)


@contextlib.contextmanager
def collected() -> Iterator[Signals]:
    """Collects SIGTERM and SIGINT, which stop, and SIGHUP, which reloads; once left, all is as before.

    A SIGHUP that comes because the terminal of this process is gone stops as well: nobody could stop it from there.
    """
    found, on_terminal = Signals(), _has_terminal()

    def hang_up() -> None:
        if on_terminal and not _has_terminal():
            found.add()
        else:
            found.add_reload()

    asked = {signal.SIGTERM: found.add, signal.SIGINT: found.add, signal.SIGHUP: hang_up}
    before = {number: signal.signal(number, lambda number, _: asked[signal.Signals(number)]()) for number in asked}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _has_terminal() -> bool:
    """Whether this process can be controlled from a terminal."""
    try:
        os.close(os.open(_TERMINAL, os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
