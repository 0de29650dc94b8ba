"""Where rows come from: files that are read in place, or a function that gives arrays."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..compiler.data import digest
from ..compiler.storage.files import sha256
from ..errors import DataError
from .arrays import NpyPart, NpzPart
from .functions import function_parts, polygraphy_parts
from .layout import Layout
from .lines import LinesPart, first_line_of
from .parts import Part

KINDS: Mapping[str, Callable[..., Part]] = {
    ".npy": NpyPart,
    ".npz": NpzPart,
    ".jsonl": LinesPart,
    ".ndjson": LinesPart,
}
"""What reads a file, by its suffix."""

HASHED_BYTES = 1 << 30
"""Data up to this size is known by its content; more by names, sizes and times, as reading it takes its time."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows, in an order that is always the same.

    Attributes:
        description: for people.
        parts: iterates over all parts from the first on, reading headers only where they are files.
        files: whether the parts are files, which can be read from anywhere.
        identity: what tells this data from other data; plain JSON.
    """

    description: str
    parts: Callable[[], Iterator[Part]]
    files: bool
    identity: Mapping[str, Any]


def open_source(text: str, layout: Layout) -> Source:
    """Opens a file, a folder, a pattern, or ``file.py:function``.

    Raises:
        DataError: it does not exist, or is of no known kind.
    """
    path = Path(text)
    if ".py:" in text and not path.exists():
        return Source(text, function_parts(text), files=False, identity={"code_sha256": digest(text), "function": text})
    if path.suffix == ".json" and path.is_file():
        return Source(text, polygraphy_parts(path), files=False, identity={"files": 1, "content_sha256": sha256(path)})
    files = _files(text)
    counted: dict[Path, Part] = {}

    def parts() -> Iterator[Part]:
        for file in files:
            part = counted.get(file) or open_file(file, layout)
            if isinstance(part, LinesPart):  # its lines are counted once
                counted[file] = part
            yield part

    return Source(text, parts, files=True, identity=_identity(files))


def part_of(path: str, **place: Any) -> Part:
    """The part that is in a file, as `Part.place` names it.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    try:
        return KINDS[Path(path).suffix](Path(path), **place)
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, struct.error) as error:
        raise DataError(f"{path} cannot be read", found=error) from error


def open_file(path: Path, layout: Layout) -> Part:
    """The part in a file, as the layout wants it.

    Raises:
        DataError: it cannot be read, or holds one array where the model takes several.
    """
    if path.suffix == ".npy":
        names = [spec.name for spec in layout.signature.inputs]
        if len(names) > 1 or layout.keep:
            raise DataError(
                f"{path} holds one array, and several are needed", expected=f".npz with {', '.join(_wanted(layout))}"
            )
        return part_of(str(path), name=names[0])
    if path.suffix == ".npz":
        return part_of(str(path))
    first = first_line_of(path)
    wanted: dict[str, tuple[str | None, list[int] | None]] = {}
    for spec in layout.signature.inputs:
        if spec.name not in layout.stacked:
            raise DataError(
                f"{path} has rows only, and input {spec.name!r} is shared by all", expected="an .npz file with it"
            )
        dims = spec.shape[1:]
        found = np.shape(first[spec.name]) if spec.name in first and _is_regular(first[spec.name]) else ()
        shape = [
            dim if isinstance(dim, int) else found[i] if i < len(found) else layout.signature.axes[dim].opt
            for i, dim in enumerate(dims)
        ]
        wanted[spec.name] = spec.dtype, shape
    wanted |= dict.fromkeys(layout.keep, (None, None))
    return part_of(str(path), wanted=wanted)


def _is_regular(value: Any) -> bool:
    try:
        np.shape(value)
    except ValueError:
        return False
    return True


def _wanted(layout: Layout) -> list[str]:
    return [spec.name for spec in layout.signature.inputs] + list(layout.keep)


def _files(text: str) -> list[Path]:
    path = Path(text)
    kinds = ", ".join(KINDS)
    if path.is_file():
        if path.suffix not in KINDS:
            raise DataError(
                f"data {text!r} is of an unknown kind",
                expected=f"{kinds}, .json (Polygraphy), a folder or pattern of these, or file.py:function",
                found=path.suffix or "no suffix",
            )
        return [path]
    if path.is_dir():
        found = [file for file in path.iterdir() if file.suffix in KINDS and file.is_file()]
    elif set(text) & set("*?["):
        found = [file for file in map(Path, glob.iglob(text, recursive=True)) if file.is_file()]
        if other := [file for file in found if file.suffix not in KINDS]:
            raise DataError(f"pattern {text!r} takes in {other[0]}, of an unknown kind", expected=kinds)
    else:
        raise DataError(f"data {text!r} does not exist", hint=f"give a file ({kinds}), a folder, or file.py:function")
    if not found:
        raise DataError(f"{text!r} holds no data", expected=f"files of {kinds}", found="none")
    return sorted(found)


def _identity(files: list[Path]) -> dict[str, Any]:
    """By content, or by names, sizes and times where that would take long."""
    result = hashlib.sha256()
    try:
        facts = [file.stat() for file in files]
        small = sum(fact.st_size for fact in facts) <= HASHED_BYTES
        for file, fact in zip(files, facts, strict=True):
            content = sha256(file) if small else f"{fact.st_size} {fact.st_mtime_ns}"
            result.update(f"{file.name}\0{content}\n".encode())
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read", found=error.strerror) from error
    kind = "content_sha256" if small else "sizes_and_times_sha256"
    return {"files": len(files), "bytes": sum(fact.st_size for fact in facts), kind: result.hexdigest()}
