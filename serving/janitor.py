"""A shell that cleans up after a supervisor that was killed, and could not do so itself."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from types import TracebackType

from .server import SHARED_MEMORY

_SCRIPT = """
server=
while read -r line; do server=$line; done
if [ -n "$server" ]; then
    kill -TERM "$server" 2>/dev/null
    left=$3
    while [ "$left" -gt 0 ] && kill -0 "$server" 2>/dev/null; do sleep 1; left=$((left - 1)); done
    kill -KILL "$server" 2>/dev/null
    sleep 2
fi
rm -rf -- "$1" "$2"*
"""
"""Reads the process id of the server that runs, or an empty line where none does, until the supervisor is gone. Models
see within two seconds that their server is gone."""


class Janitor:
    """Waits for the end of this process, which it sees by a pipe: no signal can keep that from it.

    Args:
        folder: what to remove.
        prefix: of the names of the server's shared memory.
        grace_s: how long the server may take to answer what is in flight.
    """

    def __init__(self, folder: Path, prefix: str, grace_s: float) -> None:
        shared = SHARED_MEMORY / prefix
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT, "enginesmith-janitor", str(folder), str(shared), str(int(grace_s) + 1)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )

    def watch(self, server: int | None) -> None:
        """Names the process of the server; None where none runs."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody ended it; what this process cleans up itself stays clean
            os.write(self._process.stdin.fileno(), f"{server or ''}\n".encode())

    def __enter__(self) -> Janitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
