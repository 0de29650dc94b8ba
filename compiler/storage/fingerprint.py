"""The key of a compile: one SHA-256 over everything that decides a bundle."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import SourceError
from ..data import digest
from ..extensions import files_of
from ..machine.environment import identity
from ..recipe import PATHS, Recipe
from ..sources.detect import detect
from .cache import code_digest, key
from .files import sha256


def is_self_contained(recipe: Recipe) -> bool:
    """Whether the files that the recipe names tell what the model is, without loading it.

    A factory that brings its own weights must run to tell, and an ONNX file may keep its weights in others.
    """
    if ".py:" in recipe.model:
        return recipe.weights is not None
    try:
        return detect(Path(recipe.model)) != "onnx"
    except SourceError:
        return False


def is_repeatable(recipe: Recipe) -> bool:
    """Whether equal files mean an equal bundle. What a data function yields may change without its code."""
    return not any(data and ".py:" in data for data in (recipe.data, recipe.calibration_data))


def compile_key(recipe: Recipe, machine: Mapping[str, Any], model_fingerprint: str = "") -> str:
    """SHA-256 over all that decides a bundle. Its numbers are this machine's, so another machine's never serves."""
    files = {name: _digests(value) for name in PATHS if (value := getattr(recipe, name))}
    return key(
        {
            "recipe": recipe.model_dump(mode="json"),
            "files": files,
            "own": files_of((*recipe.passes, *recipe.targets)),
            "model": model_fingerprint,
            "machine": machine,
            "identity": identity(),
            "code": code_digest(),
        }
    )


def local_modules(known: Iterable[str]) -> dict[str, str]:
    """Hashes of the user's own modules imported since `known` was taken; installed packages count by version."""
    installed = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    package = Path(__file__).parents[2]
    own = tuple(str(package / name) for name in ("compiler", "passes", "targets"))
    found = {}
    for name in set(sys.modules) - set(known):
        file = getattr(sys.modules[name], "__file__", None)
        if not file or not Path(file).is_absolute():  # torch.ops gives a bare file name
            continue
        if file.endswith(".py") and not file.startswith((*installed, *own)):
            found[file] = sha256(Path(file))
    return found


def still_hold(dependencies: Mapping[str, str]) -> bool:
    """Whether modules recorded by `local_modules` are still the same."""
    try:
        return all(sha256(Path(file)) == value for file, value in dependencies.items())
    except OSError:
        return False


def _digests(source: str) -> dict[str, str]:
    path = Path(source.rpartition(":")[0] if ".py:" in source else source)
    if path.is_dir() or not path.exists():
        return {str(path): digest(source) if path.exists() else "missing"}
    return {path.name: sha256(path)}
