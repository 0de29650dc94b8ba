"""What lies in the cache: folders of files and small JSON values, each sealed by hashes, and loose files of builders.

    bundles|engines|captures|calibration/<key>/entry.json  kind, key, size, what it is, the hash of each file
                                              content/...
    trials/<key>.json                                      the same with a value in place of files
    builders/*  tensorrt-rtx/*                             timing caches and the like, which their own software checks

A last use is the modification time of entry.json, or of the file. One look over all entries reads no content.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from .files import hashes, size_bytes

Kind = Literal["bundles", "engines", "captures", "calibration", "trials"]
SEALED: tuple[Kind, ...] = ("bundles", "engines", "captures", "calibration", "trials")
LOOSE = ("builders", "tensorrt-rtx")
KINDS = (*SEALED, *LOOSE)

ENTRY, CONTENT = "entry.json", "content"
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Entry:
    """One thing in the cache.

    Attributes:
        path: its folder, or its file.
        created, used: seconds since the epoch.
        what: for people: model, target, precision.
        notes: for those who take it out.
        files: SHA-256 of each file by its path in `content`; None where it is no folder.
        value: of a JSON value; None where it is none.
        problem: why it cannot be read; empty where it can.
    """

    kind: str
    key: str
    path: Path
    size_bytes: int
    created: float
    used: float
    what: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] | None = None
    value: Mapping[str, Any] | None = None
    problem: str = ""

    @property
    def content(self) -> Path:
        """Where the files are."""
        return self.path / CONTENT

    @property
    def lock(self) -> Path:
        """The file that is locked while it is read."""
        return self.path / ENTRY if self.path.is_dir() else self.path

    def to_json(self) -> dict[str, Any]:
        """What `cache list --json` tells."""
        names = ("kind", "key", "size_bytes", "created", "used", "problem")
        return {**{name: getattr(self, name) for name in names}, "what": dict(self.what)}


def write_entry(folder: Path, kind: Kind, key: str, what: Mapping[str, str], notes: Mapping[str, Any]) -> None:
    """Seals `folder`, whose files are in `content`."""
    content = folder / CONTENT
    head = _head(kind, key, what)
    head |= {"notes": dict(notes), "size_bytes": size_bytes(content), "files": hashes(content)}
    (folder / ENTRY).write_text(_sealed(head))


def write_value(file: Path, kind: Kind, key: str, what: Mapping[str, str], value: Mapping[str, Any]) -> None:
    """Writes a sealed JSON value."""
    file.write_text(_sealed({**_head(kind, key, what), "value": dict(value)}))


def read_entry(path: Path, kind: str) -> Entry:
    """Reads what is known about an entry, but none of its files; `problem` tells what is wrong.

    Raises:
        OSError: it is gone.
    """
    if kind in LOOSE:
        return _loose(path, kind)
    file, key = (path / ENTRY, path.name) if path.is_dir() else (path, path.stem)
    try:
        status, text = file.stat(), file.read_text()
    except (FileNotFoundError, UnicodeDecodeError):
        return _broken(kind, key, path, f"{file.name} is missing or damaged")
    try:
        head = _unsealed(text)
    except (ValueError, KeyError, TypeError):
        return _broken(kind, key, path, f"{file.name} is damaged")
    if (head["kind"], head["key"]) != (kind, key):
        return _broken(kind, key, path, f"it was written as {head['kind']}/{head['key']}")
    return Entry(
        kind=kind,
        key=key,
        path=path,
        size_bytes=head.get("size_bytes", 0) + status.st_size,
        created=head["created"],
        used=status.st_mtime,
        what=head["what"],
        notes=head.get("notes", {}),
        files=head.get("files"),
        value=head.get("value"),
    )


def problem_of(entry: Entry) -> str:
    """What is wrong with an entry, by the hash of every file; empty where nothing is."""
    if entry.problem or entry.files is None:
        return entry.problem
    try:
        found = hashes(entry.content)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    wrong = [name for name in sorted({*found, *entry.files}) if found.get(name) != entry.files.get(name)]
    if not wrong:
        return ""
    change = "is missing" if wrong[0] not in found else "was added" if wrong[0] not in entry.files else "changed"
    return f"{wrong[0]} {change}"


def scan(root: Path, kinds: Iterable[str] = KINDS, *, brief: bool = False) -> Iterator[Entry]:
    """All entries of these kinds, in no order; of a folder it reads one small file.

    Args:
        brief: whether sizes and times of values are enough, which need no reading.
    """
    for kind in kinds:
        try:
            found = list(os.scandir(root / kind))
        except OSError:
            continue
        for item in found:
            value = kind in SEALED and item.name.endswith(".json")
            folder = kind in SEALED and not value and item.is_dir()
            if item.name.startswith(".") or item.name.endswith(".lock") or not (value or folder or kind in LOOSE):
                continue
            try:
                yield _loose(Path(item.path), kind) if brief and value else read_entry(Path(item.path), kind)
            except OSError:  # another process removed it
                continue


def _loose(path: Path, kind: str) -> Entry:
    status = path.stat()
    key = path.stem if kind in SEALED else path.name
    return Entry(kind, key, path, status.st_size, status.st_mtime, status.st_mtime)


def _head(kind: str, key: str, what: Mapping[str, str]) -> dict[str, Any]:
    return {"format": _FORMAT, "kind": kind, "key": key, "created": time.time(), "what": dict(what)}


def _sealed(head: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(head, default=float))  # as it will be read: keys are text, tuples are lists
    return json.dumps({"sha256": _digest(plain), "entry": plain}) + "\n"


def _unsealed(text: str) -> dict[str, Any]:
    """The entry in a sealed text.

    Raises:
        ValueError, KeyError, TypeError: it was changed, or is of another version.
    """
    outer = json.loads(text)
    head: dict[str, Any] = outer["entry"]
    if _digest(head) != outer["sha256"] or head["format"] != _FORMAT:
        raise ValueError("the hash does not fit")
    return head


def _digest(head: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()


def _broken(kind: str, key: str, path: Path, problem: str) -> Entry:
    try:
        status = path.stat()
        size = size_bytes(path) if path.is_dir() else status.st_size
    except OSError:
        return Entry(kind, key, path, 0, 0.0, 0.0, problem=problem)
    return Entry(kind, key, path, size, status.st_mtime, status.st_mtime, problem=problem)
