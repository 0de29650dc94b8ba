"""Keeps the cache within its bounds, and clears away what killed processes left."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import time
import uuid
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from . import locks
from .entries import ENTRY, KINDS, LOOSE, Entry, problem_of, read_entry, scan

IN_USE_S = 3600.0
"""Where a file system has no locks, what was used since then counts as being read."""

_ABANDONED_S = 86400.0
"""Files that builders keep beside their caches are from killed processes where they are older."""


@dataclasses.dataclass(frozen=True)
class Pruned:
    """What pruning did.

    Attributes:
        in_use: entries that were to go, and are being read by another process or cannot be removed.
        left_bytes: size of what is left of the kinds that were looked at.
    """

    removed: tuple[Entry, ...]
    in_use: tuple[Entry, ...]
    left_bytes: int


@dataclasses.dataclass(frozen=True)
class Verified:
    """What verifying found.

    Attributes:
        entries: how many were checked.
        broken: those with something wrong, which their `problem` tells.
        removed: keys of those of them that were removed.
    """

    entries: int
    broken: tuple[Entry, ...]
    removed: frozenset[tuple[str, str]]


def prune(root: Path, max_bytes: float, *, older_than_s: float | None = None, kinds: Collection[str] = KINDS) -> Pruned:
    """Removes what was unused for longer, and then the entries unused for longest until the rest is small enough.

    What is being read stays. Entries that cannot be read go first.
    """
    sweep(root)
    now = time.time()
    entries = sorted(scan(root, kinds, brief=True), key=lambda entry: (not entry.problem, entry.used), reverse=True)
    removed, in_use, left, full = [], [], 0, False
    for entry in entries:
        stale = older_than_s is not None and now - entry.used > older_than_s
        full = full or left + entry.size_bytes > max_bytes
        if not entry.problem and not stale and not full:
            left += entry.size_bytes
            continue
        try:
            gone = discard(root, entry)
        except OSError:
            gone = False
        if gone:
            removed.append(entry)
        else:
            in_use.append(entry)
            left += entry.size_bytes
    return Pruned(tuple(removed), tuple(in_use), left)


def verify(root: Path, kinds: Iterable[str] = KINDS, *, remove: bool = True) -> Verified:
    """Compares every entry with its hashes; loose files of builders have none."""
    broken, removed, count = [], set(), 0
    for listed in scan(root, [kind for kind in kinds if kind not in LOOSE]):
        with locks.sharing(listed.lock) as shared:
            if not shared and not (listed.problem and listed.path.exists()):  # another process is removing it
                continue
            entry = read_entry(listed.path, listed.kind) if shared else listed
            count += 1
            problem = problem_of(entry)
        if not problem:
            continue
        broken.append(dataclasses.replace(entry, problem=problem))
        with contextlib.suppress(OSError):
            if remove and discard(root, entry):
                removed.add((entry.kind, entry.key))
    return Verified(count, tuple(broken), frozenset(removed))


def discard(root: Path, entry: Entry) -> bool:
    """Removes an entry unless another process is reading it; whether it is gone.

    Raises:
        OSError: the cache cannot be written.
    """
    if not entry.path.is_dir():
        entry.path.unlink(missing_ok=True)
        return True
    lock = entry.path / ENTRY
    if not lock.exists():  # without it nobody reads the entry
        return _remove(root, entry.path)
    try:
        with locks.seizing(lock) as state:
            if state == "busy" or (state == "unknown" and time.time() - entry.used < IN_USE_S):
                return False
            return _remove(root, entry.path)
    except FileNotFoundError:
        return True


@contextlib.contextmanager
def scratch(root: Path) -> Iterator[Path]:
    """A folder in the cache for the block, to make things in and move them from; `sweep` removes it after a kill.

    Raises:
        OSError: the cache cannot be written.
    """
    folder = root / "tmp" / uuid.uuid4().hex
    with locks.taking(folder.with_suffix(".lock")):
        try:
            folder.mkdir(parents=True)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def sweep(root: Path) -> None:
    """Removes what processes left that were killed: half-written entries, locks, files of builders."""
    for lock in root.glob("tmp/*.lock"):
        with locks.taking(lock) as state:
            if state == "held" or (state == "unknown" and _is_old(lock)):
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    for lock in root.glob("locks/*"):
        with locks.taking(lock):
            pass  # taking a lock removes its file
    for path in root.glob("builders/*"):
        left_over = path.is_dir() or re.search(r"\.\d+$", path.name)
        if left_over and _is_old(path):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _remove(root: Path, path: Path) -> bool:
    """Moves a folder out of sight in one step, and then removes it."""
    with scratch(root) as own, contextlib.suppress(FileNotFoundError):
        path.rename(own / "gone")
    return True


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _ABANDONED_S
    except OSError:
        return False
