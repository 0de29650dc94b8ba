"""Diagnoses engines of a bundle: the best, and the one that its ladder began with, unless others are named."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import DataError, EngineError, EnginesmithError, RecipeError, UnknownNameError
from ...targets import get_target
from ...targets.base import EngineInfo
from ..again import find_own
from ..bundle import Bundle
from ..data import Data, open_data
from ..engine import check_files
from ..manifest import EngineRecord, Roofline
from ..progress import Progress
from ..recipe import Recipe, make_recipe, read_recipe
from ..signature import Signature
from ..storage.cache import Cache
from ..validation.reference import ReferenceOutputs
from .diagnosed import Diagnosed
from .reading import time_reading
from .roofline import examine
from .use import Use

if TYPE_CHECKING:
    from ..graph import Graph

FIELDS = ("data", "seed")
"""Fields of the recipe that may be given with a bundle, which knows the others."""


def of_bundle(path: Path, names: Sequence[str], fields: Mapping[str, Any], progress: Progress) -> Diagnosed:
    """Looks at the engines of these names, or of its own choice where there are none; see `diagnose`."""
    if foreign := sorted(fields.keys() - set(FIELDS)):
        raise RecipeError(
            f"field {foreign[0]!r} cannot be given with a bundle, which knows its own",
            expected=" or ".join(FIELDS),
            found=foreign[0],
        )
    bundle = Bundle.open(path)
    recipe = make_recipe({**read_recipe(path / "recipe.yaml").model_dump(), **fields}, "call")
    find_own(recipe.targets)
    signature = Signature.from_json(bundle.manifest["signature"])
    records = _chosen(bundle, names)
    progress.stage("read data", 1, len(records) + 1)
    data = _data(recipe, signature, asked="data" in fields)
    reading = time_reading(data) if data else None
    if data and "data" in fields:
        sample: Mapping[str, np.ndarray] = data.first()
    else:
        sample = _recorded(bundle, signature)
    found: list[tuple[Roofline, Use]] = []
    missing: dict[str, str] = {}
    for number, record in enumerate(records, start=2):
        progress.stage(record["name"], number, len(records) + 1)
        check_files(path, record["name"], bundle.manifest)
        try:
            with _graph_of(bundle, record, recipe, missing) as graph:
                ladder = bundle.manifest.get("ladder")
                made = examine(path, record, signature, sample, Cache(), graph=graph, ladder=ladder, reading=reading)
                found.append(made)
        except EngineError as error:
            missing[record["name"]] = error.message
    if not found:
        raise EngineError(
            f"no engine of {str(path)!r} could be diagnosed here",
            found="; ".join(f"{name}: {reason}" for name, reason in missing.items()),
            hint="name another with --engine, or diagnose it on the machine that it runs on",
        )
    return Diagnosed(str(path), "bundle", tuple(found), reading, missing=missing)


def _chosen(bundle: Bundle, names: Sequence[str]) -> list[EngineRecord]:
    records = {record["name"]: record for record in bundle.manifest["engines"]}
    for name in names:
        if name not in records:
            raise UnknownNameError("engine", name, records)
        if records[name]["status"] not in ("ready", "built"):
            raise EngineError(f"engine {name!r} was not built", found=records[name]["reason"])
    if not names:
        built = [record for record in records.values() if record["status"] in ("ready", "built")]
        best = bundle.manifest["verdict"].get("best") or next((r["name"] for r in built if r["status"] == "ready"), "")
        names = [name for name in (best, _start_of(bundle, records.get(best))) if name in records]
    return [records[name] for name in dict.fromkeys(names)] or list(records.values())


def _start_of(bundle: Bundle, best: EngineRecord | None) -> str:
    """The engine that the ladder's estimates are about: of the same target, where the ladder began."""
    ladder = bundle.manifest.get("ladder")
    if not ladder or best is None:
        return ""
    names = {record["name"] for record in bundle.manifest["engines"]}
    steps = [step for step in ladder["steps"] if step["target"] == best["target"] and step["candidate"] in names]
    starts = [step for step in steps if step["status"] == "start"] or [s for s in steps if s["step"] == "simplify"]
    return starts[0]["candidate"] if starts else ""


def _data(recipe: Recipe, signature: Signature, *, asked: bool) -> Data | None:
    """The user's data; of a bundle that was moved they may be gone, which matters only where they are asked for."""
    if recipe.data is None:
        return None
    try:
        return open_data(recipe.data, signature, seed=recipe.seed)
    except DataError:
        if asked:
            raise
        return None


def _recorded(bundle: Bundle, signature: Signature) -> Mapping[str, np.ndarray]:
    samples = ReferenceOutputs(bundle.path / "reference", signature)
    return next(iter(samples)).inputs


@contextmanager
def _graph_of(bundle: Bundle, record: EngineRecord, recipe: Recipe, missing: dict[str, str]) -> Iterator[Graph | None]:
    """What an engine was built from, made again where its folder holds none; None where that cannot be."""
    info = EngineInfo.read(bundle.path / "engines" / record["name"])
    if info.entry.endswith(".onnx") or get_target(info.target, info.options).capabilities.consumes != "graph":
        yield None
        return
    from ..debug.graphs import captured_graph, graph_of_engine

    with tempfile.TemporaryDirectory(prefix="enginesmith-") as scratch:
        graph = None
        try:
            captured = captured_graph(bundle, recipe, Path(scratch))
            graph = graph_of_engine(bundle, record, captured, recipe)
        except EnginesmithError as error:
            missing[f"graph of {record['name']}"] = error.message
        yield graph
