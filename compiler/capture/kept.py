"""Exports kept in the cache: a model is exported once, for any passes, precisions and targets that it is compiled with.

What is taken out is checked against the reference like a new export, for the files of a model do not tell all that
decides its graph.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..machine.environment import version
from ..storage.cache import Cache, code_digest, key, room_bytes
from ..storage.files import size_bytes
from ..storage.fingerprint import local_modules, still_hold

if TYPE_CHECKING:
    from ..sources import Model

_EXPORTERS = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxsim", "transformers")
"""Packages that decide what an export looks like."""

_SHARE = 0.1
"""Of the cache's room, what one export may take: it holds all weights, and the engines hold them too."""


def export_key(model: Model, exporter: str, opset: int) -> str:
    """SHA-256 over what decides an export. The sizes that it is made at follow from the signature."""
    return key(
        {
            "source": model.fingerprint,
            "kind": model.kind,
            "signature": model.signature.to_json(),
            "exporter": [exporter, opset],
            "versions": {name: version(name) for name in _EXPORTERS},
            "code": code_digest(),
        }
    )


def take(cache: Cache, key: str, folder: Path) -> bool:
    """Copies the files of the export into `folder`; whether there is one, of the user's code as it is now."""
    with cache.reading("captures", key) as kept:
        if kept is None or not still_hold(kept.notes):
            return False
        with contextlib.suppress(OSError):
            shutil.copytree(kept.content, folder, dirs_exist_ok=True)
            return True
    return False


def keep(cache: Cache, key: str, folder: Path, exporter: str) -> None:
    """Keeps the files of an export, where they are no large part of the cache."""
    if size_bytes(folder) <= _SHARE * room_bytes():
        cache.put("captures", key, folder, what={"exporter": exporter}, notes=local_modules(_gone()))


def _gone() -> set[str]:
    """Modules whose files were removed since they were imported: no later process can import them."""
    files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    return {name for name, file in files.items() if file and not Path(file).exists()}
