"""`enginesmith debug`: which node makes the error of an engine of a bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError, EngineError, RecipeError, TargetUnavailableError, UnknownNameError, UsageError
from ...targets import get_target, parse_target
from ...targets.base import EngineInfo, Target
from ..again import find_own
from ..bundle import Bundle
from ..data import open_data
from ..engine import check_files
from ..graph import Graph
from ..manifest import EngineRecord
from ..progress import Progress
from ..recipe import Recipe, make_recipe, read_recipe
from ..signature import Signature
from ..trial import open_runner
from ..validation.metrics import coarser, resolve_tolerance
from ..validation.polygraphy_io import EngineRunner
from ..validation.reference import ReferenceOutputs
from .distance import Distance, distance, worst
from .findings import Findings, find
from .graphs import captured_graph, graph_of_engine
from .runtimes import AsEngine, plainly
from .trace import Side

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Arrays], Mapping[str, np.ndarray]]
REFERENCE = "reference"
STAGES = 3


@dataclasses.dataclass(frozen=True)
class Debugged:
    """The findings on one engine.

    Attributes:
        against: "reference", or the engine that it was compared with.
        runs_on: the target on which the graph ran.
        sample: key of the sample where the engine is farthest off; `samples` is how many there were.
        outputs: relative L2 of each output of the engine there; None where it is not finite.
    """

    engine: str
    against: str
    runs_on: str
    sample: str
    samples: int
    outputs: Mapping[str, float | None]
    findings: Findings

    @property
    def diverges(self) -> bool:
        """Whether the outputs are off by more than the threshold."""
        return self.findings.diverges

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite are None."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "findings"}
        return {**own, "outputs": dict(self.outputs), **self.findings.to_json()}


def debug_bundle(
    path: Path,
    engine: str | None = None,
    *,
    against: str = REFERENCE,
    on: str | None = None,
    threshold: float | None = None,
    progress: Progress | None = None,
    **fields: Any,
) -> Debugged:
    """Compares an engine with the model, or with another engine, on the sample where it is farthest off.

    Args:
        engine: the one to examine; by default the one farthest beyond its tolerance.
        against: "reference" for the captured graph in fp32, or the name of another engine.
        on: text of a target that runs the engine's graph in place of its own, for instance where there is no GPU; what
            is found is about the graph then.
        threshold: relative L2 above which a tensor diverges; by default the tolerance of the engine's precision.
        fields: `data` and `max_samples` of the recipe.

    Raises:
        UsageError: an engine that does not exist or has no graph, a threshold that is no bound.
        SourceError: the model cannot be loaded any more, or is another.
        EngineError: an engine cannot run here.
    """
    progress = progress or Progress()
    bundle, recipe = Bundle.open(path), read_recipe(path / "recipe.yaml")
    find_own(recipe.targets)
    record = _built(bundle, engine) if engine else _worst(bundle)
    other = None if against == REFERENCE else _built(bundle, against)
    if other is record:
        raise UsageError(f"engine {record['name']!r} cannot be compared with itself", hint="name another one")
    bound = _threshold(threshold, record, recipe, bundle)
    runs_on = parse_target(on) if on else _own_target(bundle, record)
    _require(runs_on, record["name"])
    with tempfile.TemporaryDirectory(prefix="enginesmith-") as scratch:
        progress.stage("capture graph", 1, STAGES)
        captured = _captured(bundle, [record, other] if other else [record], other is None, recipe, Path(scratch))
        graph = graph_of_engine(bundle, record, captured, recipe)
        subject = Side(graph, AsEngine(runs_on, record["precision"]))
        oracle = _oracle(bundle, other, captured, recipe)
        progress.stage("find the worst sample", 2, STAGES)
        samples = _samples(bundle, make_recipe({**recipe.model_dump(), **fields}, "call"), "data" in fields)
        with contextlib.ExitStack() as stack:
            run = (lambda inputs: subject.run(graph, inputs)) if on else stack.enter_context(_opened(bundle, record))
            right = stack.enter_context(_opened(bundle, other)) if other else None
            worst_one, count = _farthest(
                samples, run, right or (lambda inputs: oracle.run(oracle.graph, inputs)), other
            )
        progress.stage("compare tensors", 3, STAGES)
        findings = find(subject, oracle, worst_one.inputs, worst_one.truth, worst_one.error, bound, progress.update)
    return Debugged(
        engine=record["name"],
        against=against,
        runs_on=str(runs_on),
        sample=worst_one.key,
        samples=count,
        outputs={name: found.relative_l2 if found else None for name, found in worst_one.distances.items()},
        findings=findings,
    )


@dataclasses.dataclass(frozen=True)
class _Sample:
    """One sample, what is right for it, and how far the engine's outputs are from that."""

    key: str
    inputs: Arrays
    truth: Arrays
    distances: Mapping[str, Distance | None]

    @property
    def error(self) -> float:
        return worst(list(self.distances.values()))


def _built(bundle: Bundle, name: str) -> EngineRecord:
    records = {record["name"]: record for record in bundle.manifest["engines"]}
    if name not in records:
        raise UnknownNameError("engine", name, records)
    if records[name]["status"] not in ("ready", "built"):
        raise EngineError(f"engine {name!r} was not built", found=records[name]["reason"])
    return records[name]


def _worst(bundle: Bundle) -> EngineRecord:
    """The engine farthest beyond its tolerance, or nearest to it, among those whose graph is known."""
    ready = [r for r in bundle.manifest["engines"] if r["status"] in ("ready", "built") and not r.get("dropped")]
    choice = [r for r in ready if get_target(r["target"]).capabilities.consumes == "graph"]
    if not choice:
        raise UsageError(
            f"{str(bundle.path)!r} holds no engine whose nodes could be named",
            expected="an engine built from a graph",
            found=", ".join(r["name"] for r in ready) or "no engines",
        )
    return max(choice, key=_strain)


def _strain(record: EngineRecord) -> float:
    """How much of its tolerance an engine uses up, in the worst output."""
    if (validation := record["validation"]) is None:
        return 0.0
    errors = [output["relative_l2"] for output in validation["outputs"]]
    if any(error is None for error in errors):
        return math.inf
    used = max((error or 0.0 for error in errors), default=0.0) / max(validation["tolerance"]["relative_l2"], 1e-30)
    return used if validation["passed"] else used + 1e6


def _threshold(given: float | None, record: EngineRecord, recipe: Recipe, bundle: Bundle) -> float:
    if given is None and (validation := record["validation"]) is not None:
        return validation["tolerance"]["relative_l2"]
    if given is None:
        signature = Signature.from_json(bundle.manifest["signature"])
        precision = coarser(record["precision"], (spec.dtype for spec in signature.outputs))
        return resolve_tolerance(precision, recipe.tolerances.get(record["precision"]))["relative_l2"]
    if not 0 < given < math.inf:
        raise RecipeError("the threshold is no bound", expected="a relative L2 above 0, for instance 0.01", found=given)
    return given


def _own_target(bundle: Bundle, record: EngineRecord) -> Target:
    check_files(bundle.path, record["name"], bundle.manifest)
    info = EngineInfo.read(bundle.path / "engines" / record["name"])
    return get_target(info.target, info.options).part()


def _require(target: Target, engine: str) -> None:
    """Raises TargetUnavailableError where an engine cannot be built and run here."""
    state = target.availability()
    if not (state.build and state.run):
        raise TargetUnavailableError(
            f"engine {engine!r} cannot run here: {state.reason}",
            hint="run it where the engine runs, or look at its graph on another target: --on onnxruntime-cpu",
        )


def _captured(
    bundle: Bundle, records: Sequence[EngineRecord], reference: bool, recipe: Recipe, scratch: Path
) -> Graph | None:
    """The captured graph where it is needed: as the reference, or because an engine holds none."""
    entries = [EngineInfo.read(bundle.path / "engines" / record["name"]).entry for record in records]
    if not reference and all(entry.endswith(".onnx") for entry in entries):
        return None
    return captured_graph(bundle, recipe, scratch)


def _oracle(bundle: Bundle, other: EngineRecord | None, captured: Graph | None, recipe: Recipe) -> Side:
    if other is None:
        assert captured is not None
        return Side(captured, plainly)
    target = _own_target(bundle, other)
    _require(target, other["name"])
    return Side(graph_of_engine(bundle, other, captured, recipe), AsEngine(target, other["precision"]))


def _samples(bundle: Bundle, recipe: Recipe, given: bool) -> Iterator[tuple[str, Arrays, Arrays | None]]:
    """Key, inputs, and the reference's outputs where they are on record."""
    signature = Signature.from_json(bundle.manifest["signature"])
    if given:
        data = open_data(recipe.data, signature, seed=recipe.seed)
        for number, inputs in enumerate(itertools.islice(data, recipe.max_samples)):
            yield str(number), inputs, None
    else:
        for sample in ReferenceOutputs(bundle.path / "reference", signature, max_samples=recipe.max_samples):
            yield sample.key, sample.inputs, sample.outputs


@contextlib.contextmanager
def _opened(bundle: Bundle, record: EngineRecord) -> Iterator[Run]:
    """The engine itself, as it lies in the bundle."""
    signature = EngineInfo.read(bundle.path / "engines" / record["name"]).signature
    runner = open_runner(bundle.path, record)
    try:
        with EngineRunner(runner, signature, record["name"]) as opened:
            yield lambda inputs: opened.infer(inputs, check_inputs=False)
    finally:
        runner.close()


def _farthest(
    samples: Iterable[tuple[str, Arrays, Arrays | None]], run: Run, right: Run, other: EngineRecord | None
) -> tuple[_Sample, int]:
    """The sample on which the engine is farthest off, and how many there were."""
    farthest: _Sample | None = None
    count = 0
    for key, inputs, recorded in samples:
        truth = right(inputs) if recorded is None or other is not None else recorded
        outputs = run(inputs)
        sample = _Sample(key, inputs, truth, {name: distance(truth[name], outputs[name]) for name in truth})
        count += 1
        if farthest is None or sample.error > farthest.error:
            farthest = sample
    if farthest is None:
        raise DataError("there are no samples to compare on", hint="compile the model again, or give --data")
    return farthest, count
