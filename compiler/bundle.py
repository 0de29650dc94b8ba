"""A finished compile on disk: its verdict, numbers and engines."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError, VerdictError
from .manifest import EngineRecord, Manifest
from .storage.files import hashes, sha256, storage_errors
from .storage.locks import taking

if TYPE_CHECKING:
    from .engine import Engine
    from .recipe import Recipe

MANIFEST = "manifest.json"
WAIT_S = 30.0
"""How long one who adds to a bundle waits for another."""


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What `compile` gives.

    Attributes:
        path: the folder.
        cached: whether it was taken from the cache, unchanged.
    """

    path: Path
    manifest: Manifest
    cached: bool = False

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Reads the manifest of a bundle.

        Raises:
            EngineMismatchError: no bundle, or one of another layout.
        """
        from .engine import read_manifest

        return cls(Path(path), read_manifest(Path(path)))

    @property
    def passed(self) -> bool:
        """Whether every engine that could be judged is right."""
        return bool(self.manifest["verdict"]["passed"])

    def check(self) -> Bundle:
        """Gives the bundle back where its verdict is good.

        Raises:
            VerdictError: an engine is wrong.
        """
        if not self.passed:
            reasons = "; ".join(self.manifest["verdict"]["reasons"])
            raise VerdictError(f"bundle {str(self.path)!r} failed", found=reasons, hint=f"read {self.report}")
        return self

    @property
    def report(self) -> Path:
        """The report for people."""
        return self.path / "report.html"

    def engine(self, name: str) -> EngineRecord:
        """The record of one engine."""
        return next(record for record in self.manifest["engines"] if record["name"] == name)

    def load(self, engine: str | None = None) -> Engine:
        """Loads the best engine for this machine, or the named one."""
        from .engine import load

        return load(self.path, engine)


def check_output(path: Path) -> None:
    """Refuses to let a bundle take the place of anything but an empty folder or an older bundle.

    Raises:
        OutputError: the folder holds something else, or is the current one.
    """
    here = Path.cwd()
    if path.resolve() in (here, *here.parents):
        raise OutputError(f"output {str(path)!r} is the current folder, or holds it", hint="name a folder of its own")
    if path.is_dir() and any(path.iterdir()) and not _is_bundle(path):
        raise OutputError(
            f"output {str(path)!r} holds something else than a bundle, which would be lost",
            expected="no folder, an empty one, or an older bundle",
            hint="choose another folder with -o",
        )


def _is_bundle(path: Path) -> bool:
    try:
        return "enginesmith" in json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return False


def write_bundle(folder: Path, manifest: Manifest, recipe: Recipe) -> None:
    """Writes recipe, report and, last, the manifest with the hash of every other file."""
    from .report import write_report

    (folder / "recipe.yaml").write_text(recipe.dump())
    write_report(manifest, folder / "report.html")
    manifest["files"] = hashes(folder)
    (folder / MANIFEST).write_text(_text(manifest))


@contextmanager
def amending(folder: Path) -> Iterator[Manifest]:
    """Yields the manifest of a finished bundle to add to; it is written with its report when the block ends well.

    Processes that do so at the same time wait for each other. Readers find a file as it was, or as it is.

    Raises:
        UsageError, EngineMismatchError: no bundle, or one of another layout.
        OutputError, StorageError: it cannot be written.
    """
    from .engine import read_manifest
    from .report import write_report

    with storage_errors(folder), taking(folder / ".amending", wait_s=WAIT_S):
        manifest = read_manifest(folder)
        yield manifest
        with _replacing(folder / "report.html") as partial:
            write_report(manifest, partial)
            manifest["files"]["report.html"] = sha256(partial)
        with _replacing(folder / MANIFEST) as partial:
            partial.write_text(_text(manifest))


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _text(manifest: Manifest) -> str:
    return json.dumps(manifest, indent=1, default=float) + "\n"


def write_reproduction(
    directory: Path, target: str, precision: str, log: list[str], passes: Sequence[str] = ()
) -> None:
    """Leaves build.log and a script that builds this one engine again beside it, with `passes` for the recipe's."""
    directory.joinpath("build.log").write_text("\n".join(log) + "\n")
    given = "".join(f"--pass {shlex.quote(text)} " for text in passes)
    script = directory / "reproduce.sh"
    script.write_text(
        "#!/bin/sh\n"
        "# Builds this engine again, into the folder that is given.\n"
        'here=$(dirname "$(readlink -f "$0")")\n'
        f'exec enginesmith compile --recipe "$here/../../recipe.yaml" --target {shlex.quote(target)} '
        f'--precision {precision} {given}--output "${{1:?give an output folder}}"\n'
    )
    script.chmod(0o755)
