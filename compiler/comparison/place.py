"""Where an engine lies: a bundle (its best engine), ``BUNDLE#ENGINE``, or the folder of an engine.

Needs NumPy only, as loading does.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ...errors import EngineMismatchError, UsageError
from ...targets import get_target
from ...targets.base import EngineInfo, Runner
from .. import gains
from ..bundle import Bundle
from ..engine import Engine, load
from ..machine.requirements import check_machine
from ..manifest import EngineRecord, Tolerance
from ..signature import Signature
from ..states import as_floats
from ..validation.metrics import coarser, resolve_tolerance
from ..validation.reference import ReferenceOutputs


@dataclasses.dataclass(frozen=True)
class Place:
    """An engine on disk that runs on this machine.

    Attributes:
        folder: of the engine.
        bundle: what it belongs to; None where the folder stands alone.
    """

    folder: Path
    info: EngineInfo
    bundle: Bundle | None = None

    @property
    def signature(self) -> Signature:
        """What the engine takes and gives, with the caches of a decoder as floats."""
        return as_floats(self.info.signature)

    @property
    def record(self) -> EngineRecord | None:
        """Its record in the manifest."""
        return self.bundle.engine(self.info.name) if self.bundle else None

    @property
    def judged_as(self) -> str:
        """The precision whose bounds hold for it."""
        return gains.judged_as(self.info)

    @property
    def tolerance(self) -> Tolerance:
        """The bounds that it was judged by in its bundle, or those of its precision."""
        record = self.record
        if record is not None and record["validation"] is not None and "tolerance" in record["validation"]:
            return record["validation"]["tolerance"]
        return resolve_tolerance(coarser(self.judged_as, (spec.dtype for spec in self.signature.outputs)))

    def reference(self, max_samples: int | None = None) -> ReferenceOutputs | None:
        """The bundle's record of the reference; None where there is no bundle.

        Raises:
            DataError: the bundle has lost it.
        """
        if self.bundle is None:
            return None
        signature = Signature.from_json(self.bundle.manifest["signature"])
        return ReferenceOutputs(self.bundle.path / "reference", signature, max_samples=max_samples)

    def open(self) -> Runner:
        """Loads the engine."""
        return get_target(self.info.target, self.info.options).runner(self.folder, self.info)

    def engine(self) -> Engine:
        """Loads the engine, to be called with inputs by name."""
        return Engine(self.info, self.open())

    def __str__(self) -> str:
        return f"{self.bundle.path}#{self.info.name}" if self.bundle else str(self.folder)


def find(text: str | Path) -> Place:
    """The engine that `text` names.

    Raises:
        UsageError: there is neither a bundle nor an engine.
        UnknownNameError: the bundle has no such engine.
        EngineMismatchError: a file changed, or the engine was built for another machine or version.
        EngineError: no engine of the bundle, or not the named one, can run here.
    """
    path = Path(text)
    if (path / "manifest.json").exists():
        return _in_bundle(path, None)
    if (path / "engine.json").exists():
        whole = path if path.parent.name == "engines" else path.absolute()
        if whole.parent.name == "engines" and (whole.parent.parent / "manifest.json").exists():
            return _in_bundle(whole.parent.parent, whole.name)
        return _alone(path)
    root_text, separator, name = str(text).rpartition("#")
    if separator and (Path(root_text) / "manifest.json").exists():
        return _in_bundle(Path(root_text), name)
    raise UsageError(
        f"{str(text)!r} is neither a bundle nor an engine",
        expected="a bundle, BUNDLE#ENGINE, or the folder of an engine, with engine.json",
        found="no such folder" if not path.exists() else "a file" if path.is_file() else "another folder",
        hint="enginesmith compile MODEL -o BUNDLE makes a bundle",
    )


def _in_bundle(root: Path, engine: str | None) -> Place:
    """An engine of a bundle. It is loaded once: whether it runs here, and so which is the best, is known then only."""
    with load(root, engine) as loaded:
        info = loaded.info
    return Place(root / "engines" / info.name, info, Bundle.open(root))


def _alone(folder: Path) -> Place:
    try:
        info = EngineInfo.read(folder)
        target = get_target(info.target, info.options)
    except (OSError, ValueError, TypeError, KeyError, UsageError) as error:
        raise EngineMismatchError(
            f"{str(folder / 'engine.json')!r} cannot be read by this version of enginesmith: {error}",
            hint="compile the model again",
        ) from error
    check_machine(info, target)
    return Place(folder, info)
