"""Rows of .npy and .npz files. Members of a compressed .npz can only be unpacked front to back."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import DataError
from .parts import Arrays, Rows, Spec


def opened(path: str) -> IO[bytes]:
    """A file that is closed by `Part.close`."""
    return Path(path).open("rb", buffering=0)


class _ArrayFile:
    """One array in the format of .npy, at the beginning of a stream or from an offset on."""

    def __init__(self, stream: IO[bytes], where: str, *, packed: bool = False) -> None:
        begin = stream.tell()
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, self.fortran, dtype = read(stream)
        if dtype.hasobject:
            raise DataError(f"{where} holds Python objects", expected="arrays of numbers", found=str(dtype))
        self.spec = Spec(dtype, shape)
        self.offset = stream.tell() - begin
        self._packed = packed
        self._kept: np.ndarray | None = None

    def read(self, stream: IO[bytes], base: int, start: int, stop: int) -> np.ndarray:
        """Rows, from the stream in which the array begins at `base`."""
        dtype, shape = self.spec
        if self.fortran and len(shape) > 1:  # rows do not lie together: each of their elements is a column
            if self._packed:  # to seek back is to unpack again
                self._kept = self.whole(stream, base) if self._kept is None else self._kept
                return self._kept[start:stop]
            return self._columns(stream, base, start, stop)
        row = dtype.itemsize * int(np.prod(shape[1:]))
        return self._at(stream, base + self.offset + start * row, (stop - start, *shape[1:]))

    def whole(self, stream: IO[bytes], base: int) -> np.ndarray:
        """All of it, of any rank."""
        shape = self.spec.shape
        found = self._at(stream, base + self.offset, shape[::-1] if self.fortran else shape)
        return np.ascontiguousarray(found.T) if self.fortran else found

    def forget(self) -> None:
        """Lets go of what was kept."""
        self._kept = None

    def _columns(self, stream: IO[bytes], base: int, start: int, stop: int) -> np.ndarray:
        dtype, shape = self.spec
        columns = int(np.prod(shape[1:]))
        found = np.empty((columns, stop - start), dtype)
        for column in range(columns):
            at = base + self.offset + (column * shape[0] + start) * dtype.itemsize
            found[column] = self._at(stream, at, (stop - start,))
        return np.ascontiguousarray(found.T.reshape((stop - start, *shape[1:]), order="F"))

    def _at(self, stream: IO[bytes], offset: int, shape: tuple[int, ...]) -> np.ndarray:
        found = np.empty(shape, self.spec.dtype)
        stream.seek(offset)
        buffer = memoryview(found.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        while len(buffer):
            count = stream.readinto(buffer)  # type: ignore[attr-defined]
            if not count:
                raise EOFError(f"array of shape {self.spec.shape} ends early")
            buffer = buffer[count:]
        return found


class NpyPart:
    """An .npy file; its one array goes by the name that the model has for it."""

    def __init__(self, path: Path, name: str = "") -> None:
        self.name = str(path)
        self._input = name
        with path.open("rb") as stream:
            self._array = _ArrayFile(stream, str(path))
        self.specs: Mapping[str, Spec] = {name: self._array.spec}
        self._stream: IO[bytes] | None = None

    def read(self, start: int, stop: int, stacked: Collection[str], whole: Collection[str]) -> Rows:
        """Rows, or all."""
        try:
            self._stream = self._stream or opened(self.name)
            if self._input in whole:
                return Rows({self._input: self._array.whole(self._stream, 0)})
            return Rows({self._input: self._array.read(self._stream, 0, start, stop)})
        except (OSError, EOFError) as error:
            raise DataError(f"{self.name} cannot be read", found=error) from error

    def close(self) -> None:
        """Closes the file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def place(self, start: int) -> dict[str, Any]:
        """Path and name."""
        return {"path": self.name, "name": self._input}


class NpzPart:
    """An .npz file keyed by name."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._members: dict[str, tuple[zipfile.ZipInfo, _ArrayFile]] = {}
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                with archive.open(info) as stream:
                    self._members[info.filename.removesuffix(".npy")] = (
                        info,
                        _ArrayFile(stream, str(path), packed=info.compress_type != zipfile.ZIP_STORED),
                    )
        self.specs: Mapping[str, Spec] = {name: member.spec for name, (_, member) in self._members.items()}
        self._streams: dict[str, tuple[IO[bytes], int]] = {}
        self._archive: zipfile.ZipFile | None = None

    def read(self, start: int, stop: int, stacked: Collection[str], whole: Collection[str]) -> Rows:
        """Rows of some arrays, others whole."""
        arrays: Arrays = {}
        try:
            for name in (*stacked, *whole):
                stream, base = self._stream(name)
                member = self._members[name][1]
                arrays[name] = member.whole(stream, base) if name in whole else member.read(stream, base, start, stop)
        except (OSError, EOFError, zipfile.BadZipFile, ValueError, struct.error) as error:
            raise DataError(f"{self.name} cannot be read", found=error) from error
        return Rows(arrays)

    def _stream(self, name: str) -> tuple[IO[bytes], int]:
        """An open stream of a member, and where the member begins in it."""
        if name not in self._streams:
            info = self._members[name][0]
            if info.compress_type == zipfile.ZIP_STORED:
                stream = opened(self.name)
                stream.seek(info.header_offset + 26)  # lengths of name and extra field, in the local header
                lengths = struct.unpack("<HH", stream.read(4))
                self._streams[name] = stream, info.header_offset + 30 + sum(lengths)
            else:
                self._archive = self._archive or zipfile.ZipFile(self.name)
                self._streams[name] = self._archive.open(info), 0
        return self._streams[name]

    def close(self) -> None:
        """Closes the file."""
        for stream, _ in self._streams.values():
            stream.close()
        self._streams.clear()
        for _, member in self._members.values():
            member.forget()
        if self._archive is not None:
            self._archive.close()
            self._archive = None

    def place(self, start: int) -> dict[str, Any]:
        """Its path."""
        return {"path": self.name}
