"""Files that are either whole or not there: hashes, atomic writes, and folders that appear at once."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import OutputError, StorageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY)


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    result = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            result.update(block)
    return result.hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def size_bytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals to write below `path` into errors for people.

    Raises:
        OutputError: the folder cannot be written.
        StorageError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageError(
                f"no space left while writing to {str(path)!r}; nothing was kept",
                found=error.strerror,
                hint="free some space, or choose another folder with -o",
            ) from error
        if error.errno in REFUSED and str(error.filename).startswith(str(path.parent)):
            raise _unusable(path, error) from error
        raise


def _unusable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"output {str(path)!r} cannot be written", found=error.strerror, hint="choose another folder with -o"
    )


@contextmanager
def appearing_folder(path: Path) -> Iterator[Path]:
    """Yields a hidden folder beside `path` to write into; it takes the place of `path` when the block ends well.

    An older folder at `path` is exchanged in one step. Folders that killed processes left are removed.

    Raises:
        OutputError, StorageError: see `storage_errors`.
    """
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    if path.exists() and not path.is_dir():
        raise OutputError(f"output {str(path)!r} is a file", expected="a folder, or a path where none is yet")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(path)
        partial.mkdir()
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        with storage_errors(path):
            yield partial
            exchange(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def exchange(partial: Path, path: Path) -> None:
    """Puts `partial` at `path`; what was at `path` is at `partial` afterwards."""
    if not path.exists():
        partial.rename(path)
        return
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, rename_exchange = -100, 2  # AT_FDCWD of fcntl.h, RENAME_EXCHANGE of stdio.h
    if rename and rename(at_cwd, os.fsencode(partial), at_cwd, os.fsencode(path), rename_exchange) == 0:
        return
    old = partial.with_suffix(".old")  # no such call on this system: two steps
    path.rename(old)
    partial.rename(path)
    old.rename(partial)


def _remove_left_over(path: Path) -> None:
    for folder in path.parent.glob(f".{path.name}.*.partial"):
        pid = folder.name.split(".")[-2]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
