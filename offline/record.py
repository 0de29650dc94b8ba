"""The record of a run: manifest.json says what is computed and, at the end, every shard; a journal is kept meanwhile.

The journal has a line a shard, on the disk before the next one begins, so that a killed run knows what it has.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import EngineMismatchError, OutputError, UsageError
from .shards import PATTERN, sync, writing

FORMAT = 1
MANIFEST = "manifest.json"
JOURNAL = "shards.jsonl"

WHAT = {
    "bundle": "another bundle",
    "engine": "another engine",
    "data": "other data",
    "batch": "another --batch",
    "shard_rows": "another --shard-rows",
    "outputs": "other outputs (--only)",
    "keep": "another --keep",
}
"""What must be the same for a run to go on, in the order in which it is compared, and what it is where it differs."""


class Record:
    """What a folder of outputs holds.

    Attributes:
        settings: what was asked for and decided; plain JSON.
        shards: records of the shards that are there, by number.
        complete: whether all of them are.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings = dict(settings)
        self.shards: dict[int, dict[str, Any]] = {}
        self.complete = False

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """The record of an earlier run; None where the folder is empty or not there.

        Shards whose files are missing or of another size are left out, to be computed again.

        Raises:
            OutputError: the folder holds something else.
            EngineMismatchError: the record cannot be read.
        """
        path = folder / MANIFEST
        if not path.exists():
            if folder.is_dir() and any(file.suffix not in (".lock", ".partial") for file in folder.iterdir()):
                raise OutputError(
                    f"output {str(folder)!r} holds something else than the outputs of a run",
                    expected="no folder, an empty one, or one that an earlier run wrote",
                    hint="choose another folder with --out",
                )
            return None
        try:
            value = json.loads(path.read_text())
            if value["format"] != FORMAT or value["kind"] != "outputs":
                raise KeyError(f"format {value['format']}")
            record = cls(folder, value["settings"])
            record.complete = value["complete"]
            shards = value["shards"] if record.complete else _journalled(folder / JOURNAL)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EngineMismatchError(
                f"{path} is no record of a run that this version can go on with",
                found=error,
                hint="--restart begins anew; another folder keeps what is there",
            ) from error
        record.shards = {shard["shard"]: shard for shard in shards if _is_there(folder, shard)}
        record.complete = record.complete and len(record.shards) == len(shards)
        return record

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuses to go on with something else than the run began with.

        Raises:
            UsageError: the first thing that differs.
        """
        for name, what in WHAT.items():
            if name in settings and self.settings[name] != settings[name]:
                raise UsageError(
                    f"{str(self.folder)!r} was begun with {what}",
                    expected=_short(self.settings[name]),
                    found=_short(settings[name]),
                    hint="--restart begins anew and removes what is there; another --out keeps it",
                )

    def begin(self) -> None:
        """Writes manifest.json and the journal of what is there already.

        Raises:
            StorageError, OutputError: they cannot be written.
        """
        with writing(self.folder, MANIFEST):
            _replace(self.folder / JOURNAL, "".join(_line(shard) for shard in self.shards.values()))
            self._write(complete=False, shards=[])

    def add(self, shard: dict[str, Any]) -> None:
        """Notes a shard that is on the disk.

        Raises:
            StorageError, OutputError: it cannot be noted.
        """
        with writing(self.folder, JOURNAL), (self.folder / JOURNAL).open("a") as stream:
            stream.write(_line(shard))
            stream.flush()
            os.fsync(stream.fileno())
        self.shards[shard["shard"]] = shard

    def finish(self) -> None:
        """Writes all shards to manifest.json, and removes the journal.

        Raises:
            StorageError, OutputError: it cannot be written.
        """
        shards = [self.shards[number] for number in sorted(self.shards)]
        first = 0
        for shard in shards:
            shard["first_row"] = first
            first += shard["rows"]
        with writing(self.folder, MANIFEST):
            self._write(complete=True, shards=shards)
            (self.folder / JOURNAL).unlink(missing_ok=True)
        self.complete = True

    def total(self, name: str) -> int:
        """Sum of a number over the shards that are there: "rows", "nan_rows", "size_bytes"."""
        return sum(shard[name] for shard in self.shards.values())

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Rows that failed, in order."""
        return [failure for number in sorted(self.shards) for failure in self.shards[number]["failed"]]

    @property
    def failed_rows(self) -> int:
        """How many rows failed."""
        return sum(failure["rows"][1] - failure["rows"][0] for failure in self.failed)

    def _write(self, *, complete: bool, shards: list[dict[str, Any]]) -> None:
        from .. import __version__

        value = {
            "format": FORMAT,
            "kind": "outputs",
            "enginesmith": __version__,
            "complete": complete,
            "rows": self.total("rows") if complete else None,
            "failed_rows": self.failed_rows if complete else None,
            "settings": self.settings,
            "shards": shards,
        }
        _replace(self.folder / MANIFEST, json.dumps(value, indent=1) + "\n")


def remove(folder: Path) -> None:
    """Removes what an earlier run left in a folder.

    Raises:
        OutputError: the folder holds something else.
    """
    path = folder / MANIFEST
    if not path.exists():
        Record.read(folder)  # refuses what is not ours
        return
    try:
        ours = json.loads(path.read_text())["kind"] == "outputs"
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise OutputError(
            f"{str(folder)!r} holds something else than the outputs of a run, which would be lost",
            hint="choose another folder with --out",
        )
    with writing(folder, "the folder"):
        for file in (*folder.glob(PATTERN), folder / JOURNAL, path):  # the manifest last: it says whose they are
            file.unlink(missing_ok=True)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _journalled(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal that ended; the last may have been cut off, as the run that wrote it was."""
    lines = path.read_text().split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]


def _is_there(folder: Path, shard: Mapping[str, Any]) -> bool:
    try:
        return bool((folder / shard["file"]).stat().st_size == shard["size_bytes"])
    except OSError:
        return False


def _line(shard: Mapping[str, Any]) -> str:
    return json.dumps(shard) + "\n"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
