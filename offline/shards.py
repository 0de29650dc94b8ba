"""Numbered files of outputs, each whole or not there."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..compiler.storage.files import FULL, REFUSED, sha256
from ..errors import OutputError, StorageError
from .batches import Failure

PARTIAL = ".partial"
PATTERN = "shard-*.npz"


@dataclasses.dataclass(frozen=True)
class Shard:
    """Outputs of a shard's rows, in order.

    Attributes:
        arrays: outputs and kept arrays.
        failures: rows that gave none; their floating-point outputs are NaN, the others 0.
        digest: SHA-256 of the inputs, where they come from a function.
    """

    number: int
    rows: int
    arrays: Mapping[str, np.ndarray]
    failures: tuple[Failure, ...] = ()
    digest: str = ""


def file_name(number: int) -> str:
    """Name of a shard's file; names sort as numbers up to a hundred million."""
    return f"shard-{number:08d}.npz"


def write_shard(folder: Path, shard: Shard) -> dict[str, Any]:
    """Writes a shard beside its place and renames it; its record in the manifest.

    Raises:
        StorageError: the disk is full.
        OutputError: the folder cannot be written.
    """
    path = folder / file_name(shard.number)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with writing(folder, f"shard {shard.number}"):
            with partial.open("wb") as stream:
                _write_arrays(stream, shard.arrays)
                stream.flush()
                os.fsync(stream.fileno())
            record = {
                "shard": shard.number,
                "file": path.name,
                "rows": shard.rows,
                "size_bytes": partial.stat().st_size,
                "sha256": sha256(partial),
                "nan_rows": _nan_rows(shard),
                "failed": [failure.to_json() for failure in shard.failures],
            }
            if shard.digest:
                record["inputs_sha256"] = shard.digest
            partial.replace(path)
            sync(folder)
    finally:
        partial.unlink(missing_ok=True)
    return record


def _write_arrays(stream: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """As `np.savez`, which takes no array of the name "file"; the same arrays give the same bytes."""
    with zipfile.ZipFile(stream, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def sync(folder: Path) -> None:
    """Makes sure that names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(folder: Path, what: str) -> Iterator[None]:
    """Turns the operating system's refusals into errors for people.

    Raises:
        StorageError: the disk is full, or failed.
        OutputError: the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageError(
                f"no space left for {what} of {str(folder)!r}; the shards before it are whole",
                found=error.strerror,
                hint="free some space and run the same command again: it goes on there",
            ) from error
        if error.errno in (*REFUSED, errno.ENOENT, errno.ENOTDIR):
            raise OutputError(
                f"{what} of {str(folder)!r} cannot be written", found=error.strerror, hint="choose another folder"
            ) from error
        raise StorageError(f"{what} of {str(folder)!r} cannot be written", found=error.strerror) from error


def remove_partial(folder: Path) -> None:
    """Removes what killed runs left half-written."""
    for path in folder.glob(f"*{PARTIAL}"):
        path.unlink(missing_ok=True)


def _nan_rows(shard: Shard) -> int:
    """Rows with NaN among their outputs, those that failed left out."""
    found = np.zeros(shard.rows, bool)
    for array in shard.arrays.values():
        if array.dtype.kind == "f" and array.size:
            found |= np.isnan(array).reshape(shard.rows, -1).any(axis=1)
    return max(int(found.sum()) - sum(failure.stop - failure.start for failure in shard.failures), 0)
