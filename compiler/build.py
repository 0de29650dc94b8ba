"""Builds the engines of a compile, or takes from the cache what was built before; each failure stays its own."""

from __future__ import annotations

import dataclasses
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BuildError, EnginesmithError
from ..passes.base import Pass
from ..targets.base import Target
from .bundle import write_reproduction
from .data import Data
from .manifest import CaptureRecord, EngineRecord, new_engine
from .progress import Stages
from .recipe import Recipe
from .reuse import build_or_reuse
from .storage.cache import Cache
from .storage.files import size_bytes
from .trial import TORCH_BASELINES
from .variants import Variant

if TYPE_CHECKING:
    from .capture import Captured
    from .graph import Graph
    from .sources import Model


@dataclasses.dataclass(frozen=True)
class Job:
    """What all stages of one compile share. `folder` becomes the bundle, `scratch` is gone afterwards."""

    recipe: Recipe
    targets: tuple[Target, ...]
    passes: tuple[Pass, ...]
    variants: tuple[Variant, ...]
    machine: Mapping[str, Any]
    cache: Cache
    folder: Path
    scratch: Path
    stages: Stages

    def needs_model(self, captured: Captured) -> bool:
        """Whether the model runs again after the reference was recorded."""
        in_torch = self.recipe.benchmark and any(name in TORCH_BASELINES for name in self.recipe.baselines)
        return in_torch or captured.graph is None or any(t.capabilities.consumes == "module" for t in self.targets)

    @property
    def passes_need_model(self) -> bool:
        """Whether the model has to be at hand while the passes run."""
        ran = (*self.passes, *(rewrite for variant in self.variants for rewrite in variant.passes))
        return self.recipe.pruned_weights or any(rewrite.differentiates for rewrite in ran)


def build_all(
    job: Job, graphs: Mapping[str, Graph | str], capture: CaptureRecord, model: Model, data: Data
) -> list[EngineRecord]:
    """Builds every engine; one that fails leaves its reason and lets the others go on.

    Args:
        graphs: the graph of each engine, or why there is none.

    Raises:
        BuildError: a required engine failed, or none was built.
    """
    engines: list[EngineRecord] = []
    for number, variant in enumerate(job.variants):
        job.stages.update(number / len(job.variants), variant.name)
        engines.append(build_one(job, variant, graphs.get(variant.name), capture, model, data))
    check_left(engines, job.recipe.require)
    return engines


def check_left(engines: Sequence[EngineRecord], required: Sequence[str]) -> None:
    """Fails where a required engine is missing, or all are.

    Raises:
        BuildError: with the reason of each.
    """
    failed = [engine for engine in engines if engine["status"] in ("failed", "unavailable")]
    missing = [engine for engine in failed if engine["target"] in required and engine["sibling"] is None]
    if not missing and len(failed) < len(engines):
        return
    worst = (missing or failed)[0]
    reasons = [f"{engine['name']}: {engine['reason'].splitlines()[0]}" for engine in missing or failed]
    raise BuildError(
        f"required engine {worst['name']!r} cannot be had" if missing else "no engine could be built",
        found="; ".join(reasons) if len(reasons) > 1 else f"{worst['name']}: {worst['reason']}",
        hint=worst["to_do"] or None,
    )


def build_one(
    job: Job, variant: Variant, graph: Graph | str | None, capture: CaptureRecord, model: Model, data: Data
) -> EngineRecord:
    """Builds one engine into its folder; one that fails leaves its reason in the record.

    Args:
        graph: its graph, or why there is none.
    """
    name, target, precision = variant.name, variant.target, variant.precision
    record = new_engine(name, target.name, precision, variant.sibling)
    if variant.refusal:
        record["reason"] = variant.refusal
        return record
    state = target.availability()
    if not state.build:
        record.update({"reason": state.reason, "to_do": state.install})
        return record
    if problem := _mismatch(target, precision, graph, capture):
        record.update({"status": "failed", "reason": problem})
        return record
    directory = job.folder / "engines" / name
    directory.mkdir(parents=True)
    log: list[str] = []
    start = time.perf_counter()
    try:
        given = None if isinstance(graph, str) else graph
        info, record["cached"] = build_or_reuse(job, target, precision, given, model, data, directory, log, state)
    except Exception as error:  # noqa: BLE001  the step boundary: one engine's failure must not take the others along
        known = isinstance(error, EnginesmithError)
        log.extend(traceback.format_exc().splitlines())
        record.update(
            {"status": "failed", "reason": str(error) if known else f"internal error, {type(error).__name__}: {error}"}
        )
        record["to_do"] = f"see engines/{name}/build.log"
        write_reproduction(directory, str(target), precision, log)
        return record
    dataclasses.replace(info, name=name).write(directory)
    write_reproduction(directory, str(target), precision, log)
    record.update(
        {
            "status": "ready" if state.run else "built",
            "reason": state.reason,
            "to_do": state.install,
            "build_s": time.perf_counter() - start,
            "size_bytes": size_bytes(directory),
            "details": dict(info.details),
        }
    )
    return record


def _mismatch(target: Target, precision: str, graph: Graph | str | None, capture: CaptureRecord) -> str:
    """Why the target cannot take this variant; empty where it can."""
    if reason := target.refusals().get(precision):
        return reason
    if precision not in target.capabilities.precisions:
        return f"no engines of precision {precision}; it builds {', '.join(target.capabilities.precisions)}"
    if target.capabilities.consumes == "module":
        return ""
    if isinstance(graph, str):
        return graph
    if graph is None:
        return "no graph: " + "; ".join(f"{a['exporter']}: {a['reason']}" for a in capture["attempts"])
    low, high = target.opset_range() or (1, sys.maxsize)
    if not low <= graph.opset <= high:
        return f"the graph has opset {graph.opset}; the target takes {low} to {high}"
    return ""
