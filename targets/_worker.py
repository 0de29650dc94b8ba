"""A native builder or runtime in a process of its own, so that its crash, hang or hunger for memory is a result.

A worker reads requests as lines of JSON on stdin and answers on stdout with any number of ``{"progress": [fraction,
phase]}`` and one ``{"result": ...}`` or ``{"error": {"kind", "message"}}``; stderr is its log. It must end when stdin
closes: that is how workers end with a parent that was killed.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from ..errors import (
    BuildError,
    DataError,
    EngineError,
    EngineMismatchError,
    EnginesmithError,
    StorageError,
    TargetUnavailableError,
)

KINDS: Mapping[str, type[EnginesmithError]] = {
    "unavailable": TargetUnavailableError,
    "mismatch": EngineMismatchError,
    "data": DataError,
    "storage": StorageError,
}
"""Errors that a worker may answer with, by kind; any other kind is the worker's own failure."""

_TAIL_LINES = 8
_CLOSING_S = 5.0


def silent(line: str) -> None:
    """A log that keeps nothing."""


class Worker:
    """A worker process. Calls may come from several threads, and take turns.

    Args:
        command: program and arguments; it leads a process group of its own, which is killed as a whole.
        name: what to call it in messages.
        log: takes each line of the worker's log, during calls and in the calling thread.
        failure: what to raise when the worker fails, crashes or takes too long.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        name: str,
        log: Callable[[str], None] = silent,
        failure: type[EngineError] = BuildError,
    ) -> None:
        self._name = name
        self._log = log
        self._failure = failure
        self._tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self._lines: queue.Queue[tuple[str, str | None]] = queue.Queue()  # ("answer" or "log", line; None at the end)
        self._lock = threading.Lock()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise TargetUnavailableError(
                f"{name} cannot be started: {error.strerror}", expected="a program", found=command[0]
            ) from error
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        for kind, stream in (("answer", self._process.stdout), ("log", self._process.stderr)):
            threading.Thread(target=self._listen, args=(kind, stream), daemon=True).start()

    @property
    def pid(self) -> int:
        """Number of the process, which is that of its group too."""
        return self._process.pid

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(
        self,
        command: str,
        *,
        timeout_s: float,
        progress: Callable[[float, str], None] = lambda fraction, phase: None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Sends a request and waits for its result.

        Raises:
            EngineError: the `failure` of this worker, or what `KINDS` says of the error that it answered.
        """
        with self._lock:
            try:
                with contextlib.suppress(BrokenPipeError):  # it died; what it left says why
                    self._send({"command": command, **arguments})
                return self._wait(command, time.monotonic() + timeout_s, timeout_s, progress)
            except BaseException as error:
                if not isinstance(error, EnginesmithError):  # an interrupt, above all: nobody waits for it any more
                    self.kill()
                raise

    def close(self) -> None:
        """Lets the worker put its things away, and ends it. What it has said goes to the log."""
        if self._process.poll() is None:
            with contextlib.suppress(EnginesmithError):
                self.call("close", timeout_s=_CLOSING_S)
        self.kill()
        self._drain()

    def kill(self) -> None:
        """Ends the worker and all its children at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            raise self._failure(f"{self._name} has ended", hint="start over")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def _listen(self, kind: str, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self._lines.put((kind, line.rstrip("\n")))
        self._lines.put((kind, None))

    def _wait(
        self, command: str, deadline: float, timeout_s: float, progress: Callable[[float, str], None]
    ) -> dict[str, Any]:
        while True:
            try:
                kind, line = self._lines.get(timeout=max(deadline - time.monotonic(), 0.0))
            except queue.Empty:
                self.kill()
                raise self._error(
                    f"{self._name} took longer than {timeout_s:g} s for {command!r} and was stopped",
                    "allow more time, or ask for less",
                ) from None
            if kind == "log":
                if line is not None:
                    self._take(line)
            elif line is None:
                raise self._ended(command)
            else:
                answer = self._parse(command, line)
                if "progress" in answer:
                    progress(*answer["progress"])
                elif "error" in answer:
                    raise self._answered(answer["error"])
                else:
                    result: dict[str, Any] = answer["result"]
                    return result

    def _parse(self, command: str, line: str) -> dict[str, Any]:
        try:
            answer = json.loads(line)
            if isinstance(answer, dict) and answer.keys() & {"progress", "result", "error"}:
                return answer
        except ValueError:
            pass
        self.kill()
        raise self._failure(
            f"{self._name} answered {command!r} with something else than JSON",
            expected='{"result": ...} and nothing else on stdout',
            found=line[:200],
        )

    def _take(self, line: str) -> None:
        self._tail.append(line)
        self._log(line)

    def _answered(self, error: Mapping[str, str]) -> EnginesmithError:
        self._drain()
        if error["kind"] in KINDS:
            return KINDS[error["kind"]](f"{self._name}: {error['message']}")
        return self._error(f"{self._name} failed: {error['message']}", "the log says more")

    def _ended(self, command: str) -> EnginesmithError:
        """What became of a worker that closed its channel."""
        self._drain()
        try:
            code = self._process.wait(_CLOSING_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._error(f"{self._name} closed its channel during {command!r}", "the log says more")
        self.kill()  # its children, if any
        if code == -signal.SIGKILL:
            return self._error(
                f"{self._name} was killed (SIGKILL) during {command!r}, most likely because memory ran out",
                "give it more memory, or a smaller model, batch or workspace",
            )
        if code < 0:
            return self._error(
                f"{self._name} crashed with {signal.Signals(-code).name} during {command!r}",
                "a fault in the native library: another version or other options may avoid it",
            )
        return self._error(f"{self._name} ended with exit code {code} during {command!r}", "the log says more")

    def _drain(self) -> None:
        """Takes what the log still holds: until it ends, or is quiet for a moment where somebody keeps it open."""
        deadline, ended = time.monotonic() + 2.0, False
        with contextlib.suppress(queue.Empty):
            while time.monotonic() < deadline:
                kind, line = self._lines.get(timeout=0.2)
                if kind == "answer":
                    ended = ended or line is None
                elif line is None:
                    break
                else:
                    self._take(line)
        if ended:
            self._lines.put(("answer", None))  # for the next call

    def _error(self, message: str, hint: str) -> EngineError:
        found = "\n    ".join(["the log ends with", *self._tail]) if self._tail else None
        return self._failure(message, found=found, hint=hint)
