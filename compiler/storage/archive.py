"""Entries of the cache as one file, to carry from one machine to another.

A tar archive with the paths that entries have in the cache (see entries.py). Nothing of it reaches the cache before
all of it was unpacked beside it and compared with its hashes, and only regular files with such paths are unpacked.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from ...errors import ArchiveError, OutputError, StorageError
from .cache import Cache, room_bytes
from .entries import CONTENT, ENTRY, SEALED, Entry, problem_of, scan
from .files import FULL, storage_errors
from .pruning import prune, scratch

PORTABLE = ("engines", "calibration")
"""What serves other machines; numbers and verdicts are of the machine that found them."""

_INDEX = "index.json"
_KEY = rf"(?:{'|'.join(SEALED)})/[0-9a-f]+"
_FILE = re.compile(rf"{_INDEX}|{_KEY}(?:\.json|/{ENTRY}|/{CONTENT}/[^\\]+)")
_FOLDER = re.compile(rf"{_KEY}(?:/{CONTENT}(?:/.+)?)?")


@dataclasses.dataclass(frozen=True)
class Imported:
    """What importing did.

    Attributes:
        added: entries that are in the cache now.
        known: those that were there before.
    """

    added: tuple[Entry, ...]
    known: tuple[Entry, ...]


def export_entries(cache: Cache, file: Path, kinds: Collection[str] = PORTABLE) -> list[Entry]:
    """Writes the whole entries of these kinds to `file`, which appears when it is complete.

    Raises:
        OutputError, StorageError: it cannot be written.
    """
    if file.is_dir():
        raise OutputError(f"output {str(file)!r} is a folder", expected="a file, for instance engines.tar")
    partial = file.with_name(f".{file.name}.partial")
    written = []
    try:
        with storage_errors(file), tarfile.open(partial, "w:") as tar:
            for entry in _whole(cache, kinds):
                tar.add(entry.path, f"{entry.kind}/{entry.path.name}", filter=_anonymous)
                written.append(entry)
            index = json.dumps([f"{entry.kind}/{entry.key}" for entry in written]).encode()
            member = tarfile.TarInfo(_INDEX)
            member.size = len(index)
            tar.addfile(member, io.BytesIO(index))
        partial.replace(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise OutputError(f"output {str(file)!r} cannot be written", found=error.strerror) from error
    finally:
        partial.unlink(missing_ok=True)
    return written


def import_entries(cache: Cache, file: Path) -> Imported:
    """Takes all entries of an archive into the cache, or none.

    Raises:
        ArchiveError: it is none, is damaged, or holds anything else.
        OutputError, StorageError: the cache cannot be written.
    """
    try:
        with scratch(cache.root) as own:
            _unpack(file, own)
            imported = _take(cache, file, own)
    except tarfile.TarError as error:
        raise _damaged(file, str(error)) from error
    except OSError as error:
        if error.filename and Path(error.filename) == file:
            raise ArchiveError(f"archive {str(file)!r} cannot be read", found=error.strerror) from error
        if error.errno in FULL:
            raise StorageError("no space left for the archive in the cache", hint="nothing was imported") from error
        raise OutputError(f"cache {str(cache.root)!r} cannot be written", found=error.strerror) from error
    prune(cache.root, room_bytes())
    return imported


def _whole(cache: Cache, kinds: Collection[str]) -> Iterator[Entry]:
    for listed in scan(cache.root, [kind for kind in kinds if kind in SEALED]):
        if listed.value is not None:
            if not listed.problem:
                yield listed
            continue
        with cache.reading(listed.kind, listed.key) as entry:  # type: ignore[arg-type]
            if entry is not None:
                yield entry


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without who wrote it."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.isdir() else 0o644
    return member


def _unpack(file: Path, folder: Path) -> None:
    room = room_bytes()
    with tarfile.open(file, "r:") as tar:
        for member in tar:
            path = _safe(file, member)
            if path is None:
                continue
            room -= member.size
            if room < 0:
                raise ArchiveError(
                    f"archive {str(file)!r} holds more than the cache may",
                    expected=f"at most {room_bytes() / 1e9:g} GB",
                    hint="set ENGINESMITH_CACHE_GB",
                )
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            assert content is not None
            with target.open("wb") as out:
                shutil.copyfileobj(content, out)


def _safe(file: Path, member: tarfile.TarInfo) -> PurePosixPath | None:
    """Where a member goes below the cache; None for a folder, which its files make.

    Raises:
        ArchiveError: it is none of the paths of an entry.
    """
    path = PurePosixPath(member.name)
    match = _FILE.fullmatch(member.name)
    if match and member.isreg() and str(path) == member.name and ".." not in path.parts:
        return path
    if member.isdir() and _FOLDER.fullmatch(member.name) and ".." not in path.parts:
        return None
    kind = "a file" if member.isreg() else "a folder" if member.isdir() else "a link or a device"
    raise ArchiveError(
        f"archive {str(file)!r} holds {kind} named {member.name!r}, which no entry of the cache has",
        expected="what `enginesmith cache export` writes",
        hint="nothing was imported",
    )


def _take(cache: Cache, file: Path, folder: Path) -> Imported:
    """Compares what was unpacked with its hashes, and moves it into the cache."""
    try:
        index = json.loads((folder / _INDEX).read_text())
    except (FileNotFoundError, ValueError) as error:
        raise _damaged(file, "its end is missing") from error
    entries = list(scan(folder, SEALED))
    for entry in entries:
        if problem := problem_of(entry):
            raise _damaged(file, f"{entry.kind}/{entry.key}: {problem}")
    if sorted(index) != sorted(f"{entry.kind}/{entry.key}" for entry in entries):
        raise _damaged(file, "it holds other entries than it lists")
    added, known = [], []
    for entry in entries:
        place = cache.root / entry.kind / entry.path.name
        if cache.place(entry.path, place, replace=False):
            added.append(dataclasses.replace(entry, path=place))
        else:
            known.append(entry)
    return Imported(tuple(added), tuple(known))


def _damaged(file: Path, found: str) -> ArchiveError:
    return ArchiveError(f"archive {str(file)!r} is damaged", found=found, hint="nothing was imported; export it again")
