"""Locks between processes, which the kernel holds: they end with the process that holds them, however it ends.

They are files under `flock`. Processes of several machines exclude each other too, where the file system passes locks
on, as NFS does. Nothing here waits for a lock but `taking`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

try:
    import fcntl
except ImportError:  # Windows, where engines may run
    fcntl = None  # type: ignore[assignment]

State = Literal["held", "busy", "unknown"]
"""Whether a lock was taken; "unknown" where the file system has no locks, or nothing can be written there."""

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
_NO_WRITING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT)
_POLL_S = 0.1


@contextlib.contextmanager
def taking(path: Path, *, wait_s: float = 0.0, waiting: Callable[[str], None] | None = None) -> Iterator[State]:
    """A lock file of that name for the block, removed afterwards.

    Args:
        wait_s: how long to wait for who has it.
        waiting: told once who has it, where there is a wait.
    """
    end = time.monotonic() + wait_s
    state, descriptor = _take(path)
    if state == "busy" and wait_s > 0 and waiting is not None:
        waiting(_holder(path))
    while state == "busy" and time.monotonic() < end:
        time.sleep(_POLL_S)
        state, descriptor = _take(path)
    if descriptor is None:
        yield state
        return
    try:
        yield state
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held: whoever opened it sees that it is gone
        os.close(descriptor)


@contextlib.contextmanager
def sharing(path: Path) -> Iterator[bool]:
    """Keeps others from `seizing` an existing file; False where it is gone, or being seized."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        yield _lock(descriptor, shared=True) != "busy" and _is_at(descriptor, path)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def seizing(path: Path) -> Iterator[State]:
    """An existing file for the block, where nobody is `sharing` it.

    Raises:
        OSError: it is gone, or cannot be written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        state = _lock(descriptor)
        yield state if state == "busy" or _is_at(descriptor, path) else "busy"
    finally:
        os.close(descriptor)


def _take(path: Path) -> tuple[State, int | None]:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno in (*_NO_WRITING, errno.EEXIST):
                return "unknown", None
            raise
        state = _lock(descriptor)
        if state == "held" and not _is_at(descriptor, path):  # its holder removed it meanwhile
            os.close(descriptor)
            continue
        if state == "busy":
            os.close(descriptor)
            return "busy", None
        with contextlib.suppress(OSError):
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        return state, descriptor


def _holder(path: Path) -> str:
    try:
        return path.read_text(errors="replace") or "another process"
    except OSError:
        return "another process"


def _lock(descriptor: int, *, shared: bool = False) -> State:
    if fcntl is None:
        return "unknown"
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return "busy"
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return "unknown"
        raise
    return "held"


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the file that is open is still the one of that name."""
    try:
        there = path.stat()
    except OSError:
        return False
    mine = os.fstat(descriptor)
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
