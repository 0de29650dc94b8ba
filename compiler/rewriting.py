"""Runs passes: the recipe's once, then what makes each engine's graph; and keeps the statistics that they ask for."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import GraphError
from ..passes.base import Context, Kept, Pass
from .build import Job
from .data import Data
from .manifest import CalibrationRecord, PassRecord
from .pruning.module import gradients_of, hand_back
from .storage.memory import release
from .trial import calibration_of, load_budget

if TYPE_CHECKING:
    from .calibration import Calibration
    from .graph import Graph
    from .sources import Model
    from .variants import Variant


@dataclasses.dataclass(frozen=True)
class Workshop:
    """What passes are run with.

    Attributes:
        model: with its weights, where passes need them.
    """

    job: Job
    model: Model
    data: Data
    context: Context


def workshop(job: Job, model: Model, data: Data) -> Workshop:
    """Calibration, budget and gradients for the passes of a compile."""
    calibration = calibration_of(job.recipe, model.signature, data, job.cache)
    context = Context(
        model.signature,
        data,
        calibration,
        load_budget(job.recipe),
        gradients=gradients_of(model, calibration, job.recipe.seed),
        progress=job.stages.update,
    )
    return Workshop(job, model, data, context)


def run_passes(shop: Workshop, graph: Graph | None) -> tuple[dict[str, Graph | str], list[PassRecord]]:
    """The graph of every engine: the recipe's passes once, on `graph` itself, then what makes each engine's.

    Engines with the same passes share a graph. A lowering that is refused leaves its reason in place of the graph.
    """
    if graph is None:
        return {}, []
    job = shop.job
    engines = [v for v in job.variants if v.target.capabilities.consumes == "graph" and not v.refusal]
    names = [variant.name for variant in engines]
    records = [_run_pass(rewrite, graph, shop.context, "all", names)[0] for rewrite in job.passes]
    graphs: dict[str, Graph | str] = {}
    for passes in dict.fromkeys(variant.passes for variant in engines):
        alike = [variant for variant in engines if variant.passes == passes]
        made, own = lower(shop, graph, alike)
        graphs.update(dict.fromkeys((variant.name for variant in alike), made))
        records += own
    return graphs, records


def lower(shop: Workshop, graph: Graph, variants: Sequence[Variant]) -> tuple[Graph | str, list[PassRecord]]:
    """The graph of variants whose passes are equal, or why there is none; `graph` stays as it is."""
    job, names = shop.job, [variant.name for variant in variants]
    made, records = graph.clone(), list[PassRecord]()
    pruned = [variant.steps[-1] for variant in variants if variant.name.endswith("-pruned")]
    try:
        for rewrite in variants[0].passes:
            whole = made.clone() if job.recipe.pruned_weights and rewrite in pruned else None
            record, kept = _run_pass(rewrite, made, shop.context, ", ".join(names), names)
            records.append(record)
            if whole is not None and kept:
                hand_back(job.folder, shop.model, shop.data.first(), (whole, made), record, kept)
    except GraphError as error:
        return str(error), records
    return made, records


def calibrated(calibration: Calibration | None, folder: Path) -> list[CalibrationRecord]:
    """Saves the statistics that passes asked for."""
    records = []
    for statistics in calibration.collected if calibration else ():
        file = f"calibration-{statistics.digest[:12]}.npz"
        statistics.save(folder / file)
        records.append(
            CalibrationRecord(
                data=calibration.samples.description if calibration else "",
                random=statistics.random,
                samples=statistics.samples,
                tensors=len(statistics),
                digest=statistics.digest,
                file=file,
                findings=[dataclasses.asdict(finding) for finding in statistics.findings()],
            )
        )
    return records


def _run_pass(
    rewrite: Pass, graph: Graph, context: Context, variant: str, engines: Sequence[str]
) -> tuple[PassRecord, Kept]:
    before, start = sum(1 for _ in graph.nodes()), time.perf_counter()
    result = rewrite(graph, context)
    release()
    record = PassRecord(
        variant=variant,
        engines=list(engines),
        text=str(rewrite),
        seconds=time.perf_counter() - start,
        modified=result.modified,
        changes=dict(result.changes),
        refusals=[dataclasses.asdict(refusal) for refusal in result.refusals],
        details=dict(result.details),
        nodes_before=before,
        nodes_after=sum(1 for _ in graph.nodes()),
    )
    return record, result.kept
