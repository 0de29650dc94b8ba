"""A bundle as a model repository of Triton.

    FOLDER/<name>/config.pbtxt
    FOLDER/<name>/1/…                  the model, in one of two forms
    FOLDER/<name>/warmup/input-<n>.raw   values of a recorded sample, for a first inference before the model is ready

Form "python" takes any engine: ``1/model.py`` loads it through enginesmith, which the server's Python has to have.
Form "native" gives the engine's own file to the backend of its runtime, and needs nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..compiler.engine import best_batch, check_files, engine_info, named, ranked, read_manifest, usable
from ..compiler.generation.eviction import Eviction, check_eviction
from ..compiler.generation.tokens import ends_of
from ..compiler.manifest import EngineRecord, Manifest
from ..compiler.signature import Signature
from ..compiler.storage.files import appearing_folder, storage_errors
from ..compiler.validation.reference import Recorded, ReferenceOutputs
from ..errors import DataError, EngineError, OutputError, UsageError
from ..targets import get_target
from ..targets.base import EngineInfo
from .config import MARK, Kind, config, naming, warmup_file
from .decoding import decoder_config
from .drafted import Draft, of_draft
from .layout import Layout, layout
from .native import engine_files, native
from .settings import Serving

Form = Literal["python", "native"]
VERSION = "1"
CONFIG = "config.pbtxt"
SERVE = "serve.json"
"""Beside model.py: which engine to load, from where, how it is put on a GPU, and where modules are looked for first."""


@dataclasses.dataclass(frozen=True)
class Repository:
    """What was written.

    Attributes:
        path: the repository; the model is a folder in it.
        name: of the model.
        engine: that is served.
        signature: of that engine.
        merged: the largest batch that requests are merged to; 0 where they are not, and why stands in `reason`.
    """

    path: Path
    name: str
    engine: str
    signature: Signature
    merged: int
    reason: str
    form: Form

    @property
    def config(self) -> Path:
        """The configuration of the model."""
        return self.path / self.name / CONFIG

    def touch(self) -> None:
        """Makes a model of form "python" look changed to a server that is to load it once more.

        One whose files are no newer is left as it is; with a newer configuration alone it keeps its processes.
        """
        for path in (self.config, self.path / self.name / VERSION / SERVE):
            os.utime(path)


def export(bundle: Path, folder: Path, settings: Serving, form: Form = "python", *, link: bool = False) -> Repository:
    """Writes a model repository, or one model more into it. It appears as a whole or not at all.

    Args:
        link: for a server on this machine: the engine has to run here, and its files are linked where that can be, so
            that they stay whatever becomes of the bundle. Else they are copied.

    Raises:
        UsageError: no bundle, an engine that cannot be served, settings that it does not take.
        OutputError: `folder` holds something else under the name of the model.
        EngineMismatchError: the engine's files are damaged.
    """
    manifest = read_manifest(bundle)
    record = _record(bundle, manifest, settings, here=link)
    info = _info(bundle, record)
    found = _layout(info, settings)
    name = settings.name or _name(bundle)
    home = folder / name
    if home.exists() and not _is_ours(home):
        raise OutputError(
            f"{home} holds something else than a model of enginesmith's, which would be lost",
            hint="choose another folder, or another name with --name",
        )
    kind: Kind = "gpu" if "cuda" in get_target(info.target, info.options).capabilities.devices else "cpu"
    if settings.gpus and kind == "cpu":
        raise UsageError(f"engine {info.name} runs on the CPU", expected="no --gpus", found=_join(settings.gpus))
    decodes = bool(info.signature.states)
    if settings.prefix_mib and not decodes:
        raise UsageError(f"prefix_mib is for language models with their cache, which {info.name} is not")
    if settings.evict:
        if not decodes:
            raise UsageError(f"evict is for language models with their cache, which {info.name} is not")
        eviction = Eviction(settings.evict)
        prefixes, drafted = bool(settings.prefix_mib), bool(settings.draft)
        check_eviction(info.signature, eviction, prefixes=prefixes, draft=drafted)
    draft = _draft(settings, here=link)
    if draft is not None:
        if not decodes:
            raise UsageError(f"draft is for language models with their cache, which {info.name} is not")
        draft.check(info.signature)
    if decodes and form == "native":
        raise UsageError(
            f"engine {info.name} keeps a cache from token to token, which native backends do not",
            expected="--form python",
        )
    model = native(info) if form == "native" else None
    with storage_errors(folder), appearing_folder(home) as partial:
        version = partial / VERSION
        version.mkdir()
        if model:
            _copy_engine(bundle / "engines" / record["name"], version)
        else:
            extra = {**_of_decoder(bundle, settings), "draft": _write_draft(draft, version, link=link)}
            _write_python(bundle, version, manifest, record, extra if decodes else {}, decodes=decodes, link=link)
        if decodes:
            text = decoder_config(name, settings, engine=record["name"], kind=kind)
        else:
            text = config(
                name,
                info.signature,
                settings,
                found,
                backend=model.backend if model else "python",
                platform=model.platform if model else "",
                file=model.file if model else "",
                engine=record["name"],
                kind=kind,
                preferred=settings.preferred or ([best] if (best := best_batch(info, manifest)) else []),
                parameters=model.parameters if model else {},
                warmup=_write_warmup(bundle, info.signature, partial / "warmup", merged=found.max_batch > 0),
            )
        (partial / CONFIG).write_text(text)
    merged = min(found.max_batch, settings.max_batch or found.max_batch) if settings.merge else 0
    return Repository(folder, name, record["name"], info.signature, merged, found.reason, form)


def renamed(home: Path, name: str) -> None:
    """Has the configuration of the model in `home` say another name; the folder keeps its own."""
    file = home / CONFIG
    file.write_text(naming(name) + file.read_text().partition("\n")[2])


def _record(bundle: Path, manifest: Manifest, settings: Serving, *, here: bool) -> EngineRecord:
    """The engine to serve: the named one, or the best; of those that run on this machine where it is served `here`."""
    if here:
        return usable(bundle, settings.engine)
    if settings.engine is not None:
        record = named(manifest, settings.engine)
    elif candidates := ranked(manifest):
        record = candidates[0]
    else:
        raise EngineError(f"{bundle} has no engine that may be served", hint="its report says why")
    check_files(bundle, record["name"], manifest)
    return record


def _draft(settings: Serving, *, here: bool) -> Draft | None:
    found = of_draft(settings)
    if found is None:
        return None
    bundle, manifest, its_settings = found
    return Draft(bundle, manifest, _record(bundle, manifest, its_settings, here=here))


def _info(bundle: Path, record: EngineRecord) -> EngineInfo:
    info = engine_info(bundle, record["name"])
    if info.stateful:
        raise UsageError(
            f"engine {info.name} carries state from one call to the next, and requests of many clients would share it",
            hint="compile the model with its state as an input and an output",
        )
    return info


def _layout(info: EngineInfo, settings: Serving) -> Layout:
    if info.signature.states:
        return Layout(0, "requests to a language model share the calls of the engine token by token")
    found = layout(info.signature)
    largest = settings.max_batch or found.max_batch
    for option, wanted, limit in (
        ("max_batch", settings.max_batch, found.max_batch),
        ("preferred", max(settings.preferred, default=None), largest),
    ):
        if wanted is not None and not found.max_batch:
            raise UsageError(f"requests to {info.name} cannot be merged: {found.reason}", found=f"{option} {wanted}")
        if wanted is not None and wanted > limit:
            raise UsageError(f"{option} is more than {info.name} takes", expected=f"at most {limit}", found=wanted)
    return found


def _name(bundle: Path) -> str:
    name = bundle.resolve().name
    Serving(name=name)  # a folder may have a name that a model cannot have
    return name


def _of_decoder(bundle: Path, settings: Serving) -> dict[str, Any]:
    return {
        "stop": ends_of(bundle), "prefix_bytes": (settings.prefix_mib or 0) << 20, "evict": settings.evict
    }  # fmt: skip


def _is_ours(home: Path) -> bool:
    try:
        return home.is_dir() and f'key: "{MARK}"' in (home / CONFIG).read_text()
    except (OSError, ValueError):
        return False


def _copy_engine(source: Path, version: Path) -> None:
    for file in engine_files(source):
        target = version / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _write_python(
    bundle: Path,
    version: Path,
    manifest: Manifest,
    record: EngineRecord,
    extra: Mapping[str, Any],
    *,
    decodes: bool,
    link: bool,
) -> None:
    wanted = {
        **_write_bundle(bundle, version / "bundle", manifest, record, link=link),
        "path": [str(Path(entry).absolute()) for entry in sys.path] if link else [],
        **extra,
    }
    (version / SERVE).write_text(json.dumps(wanted, indent=1) + "\n")
    source = "decoder.py" if decodes else "model.py"
    shutil.copyfile(Path(__file__).with_name("backend") / source, version / "model.py")


def _write_draft(draft: Draft | None, version: Path, *, link: bool) -> dict[str, Any] | None:
    if draft is None:
        return None
    return _write_bundle(draft.bundle, version / "draft", draft.manifest, draft.record, link=link)


def _write_bundle(bundle: Path, home: Path, manifest: Manifest, record: EngineRecord, *, link: bool) -> dict[str, Any]:
    """Writes one engine of a bundle, as a bundle; returns how it is loaded."""
    name = record["name"]
    shutil.copytree(bundle / "engines" / name, home / "engines" / name, copy_function=_link if link else shutil.copy2)
    kept = {**manifest, "engines": [record], "files": _files_of(manifest, name)}
    (home / "manifest.json").write_text(json.dumps(kept, indent=1) + "\n")
    options = get_target(record["target"]).options()
    return {"bundle": home.name, "engine": name, "gpu_option": "device_id" if "device_id" in options else None}


def _link(source: str, target: str) -> None:
    """A hard link, or a copy where there can be none: on another file system, or for another's files."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


def _files_of(manifest: Manifest, engine: str) -> Mapping[str, str]:
    return {path: digest for path, digest in manifest["files"].items() if path.startswith(f"engines/{engine}/")}


def _write_warmup(bundle: Path, signature: Signature, folder: Path, *, merged: bool) -> dict[str, list[int]]:
    """Writes one row of a recorded sample; returns the shape of each input, or nothing where none was recorded."""
    try:
        sample = next(iter(ReferenceOutputs(bundle / "reference", signature)), None)
    except (DataError, ValueError, OSError):
        sample = None
    if sample is None:
        return {}
    folder.mkdir()
    return {
        spec.name: _write_raw(sample, spec.name, folder / warmup_file(number), merged=merged)
        for number, spec in enumerate(signature.inputs)
    }


def _write_raw(sample: Recorded, name: str, file: Path, *, merged: bool) -> list[int]:
    array = np.ascontiguousarray(sample.inputs[name][:1] if merged else sample.inputs[name])
    file.write_bytes(array.tobytes())
    return list(array.shape[1:] if merged else array.shape)


def _join(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
