"""What a run gave, read from its folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, OutputError, UnknownNameError
from .record import Record
from .shards import PARTIAL, writing


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Outputs of all rows, in the order of the data.

    Attributes:
        path: the folder.
        shards: its files of outputs, in order.
        rows: rows of the data.
        failed: rows that gave no outputs: {"file", "rows": [first, end], "reason"}.
        nan_rows: how many rows fit, and gave NaN all the same.
        new_rows: how many rows this call ran; the others were there.
        seconds: what this call took, from the first row on.
    """

    path: Path
    engine: str
    batch: int
    shards: tuple[Path, ...]
    rows: int
    failed: list[dict[str, Any]]
    nan_rows: int
    new_rows: int = 0
    seconds: float = 0.0

    @classmethod
    def open(cls, path: str | Path) -> Outputs:
        """Opens the folder of a finished run.

        Raises:
            OutputError: it is none.
        """
        record = Record.read(Path(path))
        if record is None or not record.complete:
            raise OutputError(
                f"{str(path)!r} holds no finished run", hint="give the command that began it again: it goes on"
            )
        return cls.of(record)

    @classmethod
    def of(cls, record: Record, *, new_rows: int = 0, seconds: float = 0.0) -> Outputs:
        """From the record of a finished run."""
        return cls(
            path=record.folder,
            engine=record.settings["engine"],
            batch=record.settings["batch"],
            shards=tuple(record.folder / record.shards[number]["file"] for number in sorted(record.shards)),
            rows=record.total("rows"),
            failed=record.failed,
            nan_rows=record.total("nan_rows"),
            new_rows=new_rows,
            seconds=seconds,
        )

    @property
    def failed_rows(self) -> int:
        """How many rows gave no outputs."""
        return sum(failure["rows"][1] - failure["rows"][0] for failure in self.failed)

    @property
    def passed(self) -> bool:
        """Whether every row gave outputs."""
        return not self.failed

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Outputs of one shard after the other."""
        for path in self.shards:
            with np.load(path, allow_pickle=False) as arrays:
                yield {name: arrays[name] for name in arrays.files}

    def __getitem__(self, name: str) -> np.ndarray:
        """One output of all rows, in memory."""
        return np.concatenate([shard[name] for shard in self])

    def save(self, name: str, path: str | Path) -> None:
        """Writes one output of all rows to an .npy file, a shard in memory at a time.

        Raises:
            UnknownNameError: there is no such output.
            DataError: rows differ in shape.
            StorageError, OutputError: the file cannot be written.
        """
        path = Path(path)
        partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
        try:
            with writing(path.parent, path.name), partial.open("wb") as stream:
                first: np.ndarray | None = None
                for shard in self:
                    if name not in shard:
                        raise UnknownNameError("output", name, shard)
                    array = shard[name]
                    if first is None:
                        first = array[:0]
                        header = {
                            "descr": array.dtype.str,
                            "fortran_order": False,
                            "shape": (self.rows, *array.shape[1:]),
                        }
                        np.lib.format.write_array_header_1_0(stream, header)
                    if (array.dtype, array.shape[1:]) != (first.dtype, first.shape[1:]):
                        raise DataError(
                            f"rows of output {name!r} differ, so they are no one array",
                            expected=(str(first.dtype), first.shape[1:]),
                            found=(str(array.dtype), array.shape[1:]),
                            hint="read the shards one by one",
                        )
                    stream.write(np.ascontiguousarray(array).data)
            with writing(path.parent, path.name):
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "out": str(self.path),
            "engine": self.engine,
            "batch": self.batch,
            "rows": self.rows,
            "new_rows": self.new_rows,
            "failed_rows": self.failed_rows,
            "failed": self.failed,
            "nan_rows": self.nan_rows,
            "shards": len(self.shards),
            "seconds": self.seconds,
            "rows_per_s": self.new_rows / self.seconds if self.seconds else None,
        }
