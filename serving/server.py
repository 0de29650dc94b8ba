"""One run of a server: its process, those of its models, its log and its shared memory."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from .triton import STUB

TAIL = 25
MAX_LOG_BYTES = 16 << 20
SHARED_MEMORY = Path("/dev/shm")

_ROUTINE = re.compile(r"I\d{4} |\d{4}-\d\d-\d\dT[\d:.]+Z I |[+|]|\s*$")
"""Lines of no interest to who runs the server, unless it dies: what goes well, and tables."""

_WITHOUT_GPU = re.compile(r"CudaDriverHelper|Failed to initialize NVML|CUDA driver version|DCGM|Signal \(15\)")
"""Complaints that every machine without a GPU hears, and the answer to our own signal."""

_DRAINED = ("All models are stopped", "Found 0 model versions that have in-flight inferences")
"""Logged once no request is in flight, before models are unloaded; the first only where none hangs while it loads."""


class Server:
    """A process that runs until it is stopped or dies. Its log goes to a file, so that it outlives its reader."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, prefix: str) -> None:
        """Starts it.

        Args:
            prefix: of the names of its shared memory, and of no other's.
        """
        self._log, self._offset = log, 0
        self._tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        self._prefix = prefix
        self._drained = False
        self._models: list[psutil.Process] = []
        self._leaving: set[psutil.Process] = set()
        log.write_bytes(b"")
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for who stops it, and must not reach it and its models as well
            )
        self.pid = self._process.pid

    @property
    def code(self) -> int | None:
        """Exit code; None while it runs."""
        return self._process.poll()

    def children(self) -> list[psutil.Process]:
        """Processes that run or load models, and those that did and died."""
        try:
            return list(psutil.Process(self.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def _running(self) -> list[psutil.Process]:
        return [child for child in self.children() if _runs_model(child)]

    def watch_models(self) -> None:
        """Notes which processes run models now, to tell later which of them `died`."""
        self._models = [child for child in self._running() if child not in self._leaving]

    def died(self) -> int | None:
        """Process id of a model that died since `watch_models`; None where all live."""
        return next((child.pid for child in self._models if is_dead(child)), None)

    def replace_models(self) -> None:
        """The models' processes that run now may end: others take their place."""
        self.watch_models()
        self._leaving.update(self._models)
        self._models = []

    def kill_models(self) -> None:
        """Ends the models' processes, of which the server sees the end at the next request only."""
        self.watch_models()
        for child in self._models:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(self._models, timeout=1)
        self._models = []

    def read_log(self, tell: Callable[[str], None] = lambda line: None) -> None:
        """Reads what was logged since, and tells what is not routine."""
        with self._log.open("rb") as stream:
            stream.seek(self._offset)
            text = stream.read()
        whole = text[: text.rfind(b"\n") + 1] if self.code is None else text
        self._offset += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            self._tail.append(line)
            self._drained |= any(words in line for words in _DRAINED)
            if not _ROUTINE.match(line) and not _WITHOUT_GPU.search(line):
                tell(line)
        if self._offset > MAX_LOG_BYTES and self._log.stat().st_size == self._offset:  # what is unread must not go
            os.truncate(self._log, 0)
            self._offset = 0

    def tail(self) -> str:
        """The last lines of the log, without tables."""
        self.read_log()
        return "\n".join(line for line in self._tail if line.strip() and line[0] not in "+|")

    def stop(self, grace_s: float, tell: Callable[[str], None], *, impatient: Callable[[], bool], healed: bool) -> bool:
        """Lets it answer what is in flight, and ends it. Gives whether all was answered.

        Args:
            impatient: whether it shall end at once after all.
            healed: a process of it that ran or loaded a model died. It waits for that one without end when it unloads
                models, which it does once all is answered.
        """
        self._process.terminate()
        deadline, drained_at = time.monotonic() + grace_s, float("inf")
        while self.code is None and time.monotonic() < min(deadline, drained_at + 1) and not impatient():
            time.sleep(0.05)
            self.read_log(tell)
            if healed and self._drained:
                drained_at = min(drained_at, time.monotonic())
        drained = self.code == 0 or self._drained
        self.kill()
        return drained

    def kill(self) -> None:
        """Ends it and its models at once, and removes what they leave in memory."""
        models = {*self._models, *self._leaving, *self._running()}
        self._process.kill()
        self._process.wait()
        models.update(_stubs(self._prefix))  # those that a server loaded when it died are nobody's children
        for child in models:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(list(models), timeout=5)
        remove_shared_memory(self._prefix)


def remove_shared_memory(prefix: str) -> None:
    """Removes the shared memory of a server that is gone."""
    for path in SHARED_MEMORY.glob(f"{prefix}*"):
        path.unlink(missing_ok=True)


def _stubs(prefix: str) -> list[psutil.Process]:
    """Processes that run models on shared memory whose names begin so."""
    lines = ((process, process.info["cmdline"] or ["", ""]) for process in psutil.process_iter(["cmdline"]))
    return [process for process, line in lines if STUB in line[0] and any(part.startswith(prefix) for part in line[1:])]


def _runs_model(process: psutil.Process) -> bool:
    try:
        return STUB in process.name() and not is_dead(process)
    except psutil.NoSuchProcess:
        return False


def is_dead(process: psutil.Process) -> bool:
    """Whether it ended, taken notice of or not."""
    try:
        return bool(process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD))
    except psutil.NoSuchProcess:
        return True
