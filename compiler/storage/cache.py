"""Content-addressed cache of bundles, engines, exports, statistics and trials, shared by processes and machines.

It lives in ``$ENGINESMITH_CACHE``, else ``$XDG_CACHE_HOME/enginesmith``, else ``~/.cache/enginesmith``; when it grows
beyond ``$ENGINESMITH_CACHE_GB`` (20 by default) the entries unused for longest are removed.

Whatever is taken out is verified by hash. What is put in appears whole or not at all. A cache that cannot be written,
or a disk that is full, is no reason to fail: then nothing is kept. What lies where is drawn in entries.py.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from ...errors import RecipeError
from . import locks
from .entries import CONTENT, Entry, Kind, problem_of, read_entry, write_entry, write_value
from .pruning import discard, prune, scratch


def key(parts: Mapping[str, Any]) -> str:
    """SHA-256 over parts that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@functools.cache
def code_digest() -> str:
    """SHA-256 of this package's own code, so that a changed pass or target never serves an old result."""
    root = Path(__file__).parents[2]
    result = hashlib.sha256()
    folders = (root / name for name in ("compiler", "passes", "targets"))
    for file in sorted([*root.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.*"))]):
        if file.suffix in (".py", ".j2", ".css"):
            result.update(file.name.encode() + file.read_bytes())
    return result.hexdigest()


def room_bytes() -> float:
    """What the cache may hold.

    Raises:
        RecipeError: the variable holds no number.
    """
    text = os.environ.get("ENGINESMITH_CACHE_GB", "20")
    try:
        return float(text) * 1e9
    except ValueError as error:
        raise RecipeError("ENGINESMITH_CACHE_GB holds no number", expected="gigabytes", found=text) from error


class Cache:
    """Entries by kind and key."""

    def __init__(self, root: Path | None = None) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        room_bytes()  # a wrong value shows before the work, not after it
        self.root = root or Path(os.environ.get("ENGINESMITH_CACHE") or Path(home) / "enginesmith")

    @contextlib.contextmanager
    def reading(self, kind: Kind, key: str) -> Iterator[Entry | None]:
        """The entry kept under `key`, safe from removal for the block; None where there is none.

        An entry whose files were changed counts as none, and is removed.
        """
        path = self.root / kind / key
        if not path.is_dir():
            yield None
            return
        with locks.sharing(path / "entry.json") as shared:
            entry = _readable(path, kind) if shared else None
            if entry is not None and not entry.problem:
                _touch(entry.lock)
                yield entry
                return
        if entry is not None:
            self._discard(entry)
        yield None

    def put(
        self,
        kind: Kind,
        key: str,
        folder: Path,
        *,
        what: Mapping[str, str] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Keeps a copy of a folder, and then the cache within its bounds.

        Args:
            what: model, target and precision, for `cache list`.
            notes: what those who take it out need beside the files.
        """
        with contextlib.suppress(OSError), scratch(self.root) as own:
            shutil.copytree(folder, own / "entry" / CONTENT)
            write_entry(own / "entry", kind, key, what or {}, notes or {})
            if self.place(own / "entry", self.root / kind / key):
                prune(self.root, room_bytes())

    def read(self, kind: Literal["trials"], key: str) -> dict[str, Any] | None:
        """The value kept under `key`; None where there is none, or a damaged one."""
        path = self.root / kind / f"{key}.json"
        try:
            entry = read_entry(path, kind)
        except OSError:
            return None
        if entry.problem or entry.value is None:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        _touch(path)
        return dict(entry.value)

    def write(
        self, kind: Literal["trials"], key: str, value: Mapping[str, Any], *, what: Mapping[str, str] | None = None
    ) -> None:
        """Keeps a small value that JSON can hold. It counts when something larger is `put`, which bounds the cache."""
        with contextlib.suppress(OSError), scratch(self.root) as own:
            write_value(own / "value", kind, key, what or {}, value)
            path = self.root / kind / f"{key}.json"
            path.parent.mkdir(exist_ok=True)
            (own / "value").replace(path)

    @contextlib.contextmanager
    def making(
        self, kind: Kind, key: str, *, wait_s: float, waiting: Callable[[str], None] | None = None
    ) -> Iterator[bool]:
        """Keeps other processes from making the same entry for the block, after they have finished with it.

        Args:
            wait_s: how long to wait for another process; after that the block runs all the same.
            waiting: told which process has it, where there is a wait.

        Yields:
            Whether there was a wait, so that the entry may be there now.
        """
        waited: list[str] = []

        def note(holder: str) -> None:
            waited.append(holder)
            if waiting is not None:
                waiting(holder)

        with locks.taking(self.root / "locks" / f"{kind}-{key}", wait_s=wait_s, waiting=note):
            yield bool(waited)

    def folder(self, name: str) -> Path:
        """A folder that outlives the compile, for timing caches and the like; a temporary one where that cannot be."""
        path = self.root / name
        with contextlib.suppress(OSError):
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                return path
        temporary = tempfile.mkdtemp(prefix="enginesmith-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return Path(temporary)

    def place(self, new: Path, path: Path, *, replace: bool = True) -> bool:
        """Moves an entry to its place; whether it is there now.

        One that is there already stays where it is being read, and where it is whole and not to be replaced.
        """
        path.parent.mkdir(exist_ok=True)
        if not replace and path.exists():
            old = _readable(path, path.parent.name)
            if old is not None and not old.problem:
                return False
        if path.is_dir() and not self._discard(read_entry(path, path.parent.name)):
            return False
        try:
            new.rename(path)
        except OSError:  # another process was faster
            return False
        return True

    def _discard(self, entry: Entry) -> bool:
        with contextlib.suppress(OSError):
            return discard(self.root, entry)
        return False


def _readable(path: Path, kind: str) -> Entry | None:
    """The entry, with what is wrong with its files; None where it is gone."""
    try:
        entry = read_entry(path, kind)
    except OSError:
        return None
    return dataclasses.replace(entry, problem=problem_of(entry))


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(path)
