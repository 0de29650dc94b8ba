"""Content-addressed cache of finished bundles and engines, verified by hash each time something is taken out.

It lives in ``$ENGINESMITH_CACHE``, else ``$XDG_CACHE_HOME/enginesmith``, else ``~/.cache/enginesmith``; when it grows
beyond ``$ENGINESMITH_CACHE_GB`` (20 by default) the entries unused for longest are removed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ...errors import OutputError, RecipeError, StorageError
from .files import appearing_folder, hashes, size_bytes

Kind = Literal["bundles", "engines", "trials"]


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
    """Folders by kind and key."""

    def __init__(self, root: Path | None = None) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        room_bytes()  # a wrong value shows before the work, not after it
        self.root = root or Path(os.environ.get("ENGINESMITH_CACHE") or Path(home) / "enginesmith")

    def get(self, kind: Kind, key: str) -> Path | None:
        """The folder kept under `key`, None where there is none or where its files were changed."""
        entry = self.root / kind / key
        try:
            expected = json.loads((entry / "hashes.json").read_text())
            if hashes(entry / "content") == expected:
                os.utime(entry)
                return entry / "content"
        except (OSError, ValueError):
            pass
        shutil.rmtree(entry, ignore_errors=True)
        return None

    def notes(self, kind: Kind, key: str) -> dict[str, Any]:
        """What `put` was told to remember beside the folder."""
        notes: dict[str, Any] = json.loads((self.root / kind / key / "notes.json").read_text())
        return notes

    def put(self, kind: Kind, key: str, folder: Path, notes: Mapping[str, Any] | None = None) -> None:
        """Keeps a copy of a folder. A cache that cannot be written is no reason to fail: then nothing is kept."""
        try:
            with appearing_folder(self.root / kind / key) as entry:
                shutil.copytree(folder, entry / "content")
                (entry / "hashes.json").write_text(json.dumps(hashes(entry / "content")))
                (entry / "notes.json").write_text(json.dumps(notes or {}))
            self._prune()
        except (OSError, StorageError, OutputError):
            return

    def folder(self, name: str) -> Path:
        """A folder that outlives the compile, for timing caches and the like; a temporary one where that cannot be."""
        path = self.root / name
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError:
            return Path(tempfile.mkdtemp(prefix="enginesmith-"))
        return path

    def _prune(self) -> None:
        room = room_bytes()
        kinds = ("bundles", "engines", "trials", "calibration")
        entries = [entry for kind in kinds for entry in (self.root / kind).glob("[0-9a-f]*")]
        for entry in sorted(entries, key=lambda path: path.stat().st_mtime, reverse=True):
            room -= size_bytes(entry) if entry.is_dir() else entry.stat().st_size
            if room < 0 and entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif room < 0:
                entry.unlink(missing_ok=True)
