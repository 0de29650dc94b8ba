"""Diagnoses a model: in torch, and as the engine that its captured graph makes in fp32."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import EngineError, EnginesmithError, RecipeError, SourceError, TargetUnavailableError, UsageError
from ...targets import parse_target
from ...targets.base import BuildRequest, Target
from ..data import Data, open_data
from ..inspection import graph_of
from ..manifest import Roofline, new_engine
from ..progress import Progress
from ..recipe import Recipe, make_recipe
from ..storage.cache import Cache
from ..trial import load
from .diagnosed import Diagnosed
from .eager import profile_model
from .reading import Reading, time_reading
from .roofline import examine
from .use import Use

if TYPE_CHECKING:
    from ..sources import Model

TARGETS = ("onnxruntime-cuda", "onnxruntime-cpu", "openvino")
"""Targets whose engine of a model is looked at: the first that can be had."""


def of_model(source: str, fields: Mapping[str, Any], progress: Progress) -> Diagnosed:
    """Looks at a model in torch and as an engine; one of the two may be impossible. See `diagnose`."""
    if not Path(source).exists() and ".py:" not in source:
        raise SourceError(f"{source!r} does not exist", expected="a model file, file.py:factory, or a bundle")
    recipe = make_recipe({**fields, "model": source}, "call")
    candidates = _candidates(recipe)
    progress.stage("load model", 1, 4)
    model = load(recipe)
    data = open_data(recipe.data, model.signature, seed=recipe.seed)
    progress.stage("read data", 2, 4)
    reading = time_reading(data)
    missing: dict[str, str] = {}
    progress.stage("profile in torch", 3, 4)
    eager = None
    try:
        eager = profile_model(model, data.first(), recipe.reference_device)
    except EngineError as error:
        missing["torch"] = error.message
    progress.stage("profile as an engine", 4, 4)
    found: list[tuple[Roofline, Use]] = []
    try:
        found.append(_as_engine(recipe, candidates, model, data, reading))
    except UsageError:
        raise
    except EnginesmithError as error:
        missing["engine"] = error.message if error.found is None else f"{error.message}: {error.found}"
    if not found and eager is None:
        reasons = "; ".join(f"{what}: {why}" for what, why in missing.items())
        raise EngineError(f"{source!r} could not be diagnosed", found=reasons)
    return Diagnosed(source, "model", tuple(found), reading, eager, missing)


def _as_engine(
    recipe: Recipe, candidates: Sequence[Target], model: Model, data: Data, reading: Reading | None
) -> tuple[Roofline, Use]:
    """The roofline of the captured graph in fp32, built for the target given, or for the best that is there."""
    target = _usable(candidates)
    low, high = target.opset_range() or (9, 20)
    with tempfile.TemporaryDirectory(prefix="enginesmith-") as scratch:
        export, root = Path(scratch) / "export", Path(scratch) / "bundle"
        directory = root / "engines" / f"{target.name}-fp32"
        export.mkdir()
        directory.mkdir(parents=True)
        graph = graph_of(recipe, model, data, export, (low, min(high, 20)))
        sample, cache = data.first(), Cache()
        request = BuildRequest(
            graph=graph,
            model=model,
            signature=model.signature,
            precision="fp32",
            sample=sample,
            directory=directory,
            cache=cache.folder("diagnose"),
            log=lambda line: None,
        )
        target.build(request).write(directory)
        record = new_engine(directory.name, target.name, "fp32")
        record["status"] = "ready"
        return examine(root, record, model.signature, sample, cache, graph=graph, reading=reading)


def _candidates(recipe: Recipe) -> list[Target]:
    """The target that is asked for, else `TARGETS`.

    Raises:
        RecipeError: several, or one that takes no graph.
    """
    if len(recipe.targets) > 1:
        raise RecipeError("a model is diagnosed on one target", found=", ".join(recipe.targets))
    candidates = [parse_target(text) for text in recipe.targets or TARGETS]
    if candidates[0].capabilities.consumes != "graph":
        raise RecipeError(
            f"target {candidates[0].name!r} takes no graph, so its layers are nodes of none",
            expected="a target that is built from a graph",
            hint="what torch does is shown in any case",
        )
    return candidates


def _usable(candidates: Sequence[Target]) -> Target:
    """The first target that works here.

    Raises:
        TargetUnavailableError: none does.
    """
    states = [target.availability() for target in candidates]
    for target, state in zip(candidates, states, strict=True):
        if state.build and state.run:
            return target
    reasons = "; ".join(f"{target.name}: {state.reason}" for target, state in zip(candidates, states, strict=True))
    raise TargetUnavailableError("no target that is built from a graph works here", found=reasons)
