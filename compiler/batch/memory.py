"""Keeps a process that is made to run out of memory from taking the machine with it.

Two fences: within the process a limit on its data, so that an allocation beyond fails as it would where memory is all
there is; and outside a watch that kills it where that limit does not reach (several processes, memory that is mapped).
"""

from __future__ import annotations

import contextlib
import re
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import psutil

from ..machine.memory import available_bytes, total_bytes

RESERVE_SHARE = 10
RESERVE_BYTES = 512 << 20
"""A tenth of the memory stays free, and never less than this."""

SLACK_BYTES = 64 << 20
"""The watch kills this far beyond the limit that the process keeps by itself."""

SIGNS = (
    "out of memory", "out_of_memory", "bad_alloc", "bad allocation", "allocate memory", "failed to allocate",
    "alloc failed", "smaller than requested", "thread creation failed",
)  # fmt: skip
"""What runtimes say where memory ran out, in lower case; a thread cannot be made for want of memory for its stack."""

_STATUS = Path("/proc/self/status")


def reserve_bytes() -> int:
    """What must stay free."""
    return max(RESERVE_BYTES, total_bytes() // RESERVE_SHARE)


def room_bytes() -> int:
    """What may be taken now."""
    return max(0, available_bytes() - reserve_bytes())


@contextlib.contextmanager
def data_limit(growth_bytes: int | None) -> Iterator[None]:
    """Within the block this process may take so much more memory; allocations beyond fail. None for no limit.

    The limit is on private, writable memory (RLIMIT_DATA): RLIMIT_AS would count the libraries and all that is merely
    reserved.
    """
    if growth_bytes is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = status_bytes("VmData") + growth_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard < 0 else min(wanted, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, for instance VmHWM, the peak of what this process has in memory."""
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def forget_peak() -> None:
    """Begins VmHWM anew, where the system lets it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def volunteer() -> None:
    """Has the system kill this process first where memory runs out all the same."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


class Watch:
    """Kills a process, while the block runs, before it takes what the machine needs.

    Attributes:
        reason: why it was killed; empty where it was not.

    Args:
        growth_bytes: what it and its children may take beyond what they have now; None for whatever is free.
        period_s: time between two looks.
    """

    def __init__(self, pid: int, kill: Callable[[], None], *, growth_bytes: int | None, period_s: float) -> None:
        self.reason = ""
        self._pid = pid
        self._kill = kill
        self._most = None if growth_bytes is None else resident_bytes(pid) + growth_bytes + SLACK_BYTES
        self._least = reserve_bytes() // 2
        self._period_s = period_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="memory-watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(self._period_s):
            taken, free = resident_bytes(self._pid), available_bytes()
            if self._most is not None and taken > self._most:
                self.reason = f"out of memory: it took {_gib(taken)}, {_gib(self._most)} were left for it"
            elif free < self._least:
                self.reason = f"out of memory: it took {_gib(taken)}, and the machine had {_gib(free)} left"
            if self.reason:
                self._kill()
                return


def reason_of(error: BaseException, more: str = "") -> str:
    """Why a batch failed, in a line; that memory ran out stands first. `more` is what else is known, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if text.endswith(":"):  # a place, as OpenVINO has it, several of them; what happened stands last
        text = f"{text} {lines[-1]}" if len(lines) > 1 else text[:-1]
    text = f"{text}: {more}"[:300] if more else text[:300]
    out = isinstance(error, MemoryError) or any(sign in f"{error} {more}".lower() for sign in SIGNS)
    return f"out of memory: {text}" if out and not text.lower().startswith("out of memory") else text


def resident_bytes(pid: int) -> int:
    """What a process and its children have in memory; 0 where it has ended."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for member in family:
        with contextlib.suppress(psutil.Error):
            total += member.memory_info().rss
    return total


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"
