"""`enginesmith diagnose`: of a model, or of the engines of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import RecipeError
from ..progress import Progress
from .diagnosed import Diagnosed
from .of_bundle import of_bundle
from .of_model import of_model


def diagnose(source: str, engines: Sequence[str] = (), *, progress: Progress | None = None, **fields: Any) -> Diagnosed:
    """Looks where the time of a model or of the engines of a bundle goes.

    Args:
        source: what `Recipe.model` takes, a bundle, or the folder of an engine in one.
        engines: of a bundle; by default the best, and the one that its ladder began with.
        fields: of the recipe: those that say what a model is and takes; `data` alone with a bundle.

    Raises:
        UsageError: an engine that does not exist, or fields that do not fit.
        ModelError: the model cannot be loaded.
        EngineError: nothing could be looked at.
    """
    progress, path = progress or Progress(), Path(source)
    if (path / "engine.json").is_file() and (path.parent.parent / "manifest.json").is_file():
        path, engines = path.parent.parent, (*engines, path.name)
    if (path / "manifest.json").is_file():
        return of_bundle(path, engines, fields, progress)
    if engines:
        raise RecipeError(f"{source!r} is no bundle, so it has no engines to name", found=", ".join(engines))
    return of_model(source, fields, progress)
