"""Puts the candidates of a rung on trial: built, judged on the record of the reference, raced against the incumbent."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..build import build_one
from ..gains import problem
from ..generation.prompts import most_rows
from ..manifest import CaptureRecord, EngineRecord, LadderStep, OutputMetrics, PassRecord, SpeedUp, Timing, Validation
from ..options import split
from ..pruning.module import FOLDER
from ..rewriting import Workshop, lower
from ..storage.memory import release
from ..trial import race, validate_engines
from ..validation.reference import ReferenceOutputs
from ..variants import Variant
from .clock import Clock
from .objective import Objective, held_bytes
from .rungs import Rung

if TYPE_CHECKING:
    from ..graph import Graph


@dataclasses.dataclass(frozen=True)
class Contender:
    """An engine with what made it: `passes` are the records of its own passes."""

    variant: Variant
    record: EngineRecord
    passes: tuple[PassRecord, ...] = ()


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What engines are judged by."""

    capture: CaptureRecord
    reference: ReferenceOutputs
    floor: tuple[str, list[OutputMetrics]]


class Trials:
    """Tries candidates in the folder of the bundle, and removes what does not stay."""

    def __init__(self, shop: Workshop, graph: Graph | None, evidence: Evidence, clock: Clock) -> None:
        self.clock = clock
        self.objective = Objective.parse(shop.job.recipe.objective)
        inner = clock.stages()
        job = dataclasses.replace(shop.job, stages=inner)
        self.shop = dataclasses.replace(shop, job=job, context=dataclasses.replace(shop.context, progress=inner.update))
        self._graph = graph
        self._evidence = evidence
        self._lowered: dict[tuple[object, ...], tuple[Graph | str | None, list[PassRecord]]] = {}

    def names(self) -> list[str]:
        """Names of all engines that are there."""
        return [folder.name for folder in (self.shop.job.folder / "engines").iterdir()]

    def kept_graph(self, variant: Variant) -> Graph | None:
        """The lowered graph of a variant, where it is at hand still."""
        graph, _ = self._lowered.get(variant.passes, (None, []))
        return None if isinstance(graph, str) else graph

    def build(self, variant: Variant, graph: Graph | str | None) -> Contender:
        """Builds an engine of a graph that is lowered already."""
        job, evidence = self.shop.job, self._evidence
        return Contender(variant, build_one(job, variant, graph, evidence.capture, self.shop.model, self.shop.data))

    def judge(self, record: EngineRecord) -> None:
        """Notes in the record of an engine how far it is from the reference."""
        job, evidence = self.shop.job, self._evidence
        update = job.stages.update
        validate_engines(job.folder, [record], evidence.reference, evidence.floor, job.recipe, update, save=False)

    def run(
        self, rung: Rung, incumbent: Contender, ahead: int, *, timed: bool
    ) -> tuple[list[LadderStep], Contender | None]:
        """All candidates of a rung, and the one that takes the incumbent's place.

        Args:
            ahead: candidates that are to come, these included.
            timed: whether engines of the target run on this machine.
        """
        steps = [
            self._step(rung, what, "", "skipped", reason, incumbent.variant) for what, reason in rung.left_out.items()
        ]
        built: list[tuple[LadderStep, Contender]] = []
        for number, variant in enumerate(rung.candidates):
            self.clock.tell(f"{variant.name}: {rung.name}", ahead - number)
            start = time.perf_counter()
            step = self._step(rung, difference(variant, incumbent.variant), variant.name, "failed", "", variant)
            steps.append(step)
            if left := self.clock.lacks(rung.name):
                step.update({"status": "skipped", "reason": f"no time: {left}"})
                continue
            contender = self._built(step, variant, incumbent)
            step["seconds"] = time.perf_counter() - start
            if contender:
                built.append((step, contender))
            else:
                self.clock.note(rung.name, step["seconds"])
        winner = self.race(built, incumbent) if timed and built else self._asked(built, asked=rung.asked)
        for step, _ in built:
            self.clock.note(rung.name, step["seconds"])  # with its share of the race
        for _, contender in built:
            if contender is not winner:
                self.remove(contender)
        return steps, winner

    def remove(self, contender: Contender, *, superseded: bool = False) -> None:
        """Removes an engine that does not stay; of one that another is made from, its pruned weights stay."""
        for folder in ("engines",) if superseded else ("engines", FOLDER):
            shutil.rmtree(self.shop.job.folder / folder / contender.record["name"], ignore_errors=True)
        release()

    def _built(self, step: LadderStep, variant: Variant, incumbent: Contender) -> Contender | None:
        """Builds and judges a candidate, and notes in the step why it does not come to a race."""
        graph, records = self._graph_of(variant)
        own = _own(records, variant, incumbent.variant)
        if graph is not None and not isinstance(graph, str) and own and not any(record["modified"] for record in own):
            reasons = [refusal["reason"] for record in own for refusal in record["refusals"]]
            why = f": {reasons[0]}" if reasons else ""
            step.update({"status": "skipped", "reason": f"it changes nothing{why}"})
            return None
        contender = dataclasses.replace(self.build(variant, graph), passes=tuple(records))
        record = contender.record
        if record["status"] == "ready":
            self.judge(record)
        step.update({"size_bytes": record["size_bytes"], "reason": record["reason"]})
        if record["status"] not in ("ready", "built"):
            self.remove(contender)
            return None
        validation = record["validation"]
        if validation is None:
            return contender
        step.update({"relative_l2": worst_error(validation), "budget": validation["budget"]})
        if not validation["passed"]:
            self.remove(contender)
            step.update({"status": "reverted", "reason": f"not close enough: {problem(validation)}"})
            return None
        return contender

    def _graph_of(self, variant: Variant) -> tuple[Graph | str | None, list[PassRecord]]:
        """The lowered graph; the last few are kept, as the options of a target change no graph."""
        if self._graph is None or variant.target.capabilities.consumes != "graph":
            return None, []
        if variant.passes not in self._lowered:
            while len(self._lowered) > 1:
                del self._lowered[next(iter(self._lowered))]
            self._lowered[variant.passes] = lower(self.shop, self._graph, [variant])
        graph, records = self._lowered[variant.passes]
        named = [PassRecord(**{**r, "variant": variant.name, "engines": [variant.name]}) for r in records]
        return graph, named

    def measure(self, step: LadderStep, contender: Contender) -> None:
        """Notes the speed of an engine by itself."""
        timings, _ = self._timed([contender.record])
        _note_timing(step, timings.get(contender.record["name"]), None)

    def race(
        self,
        built: Sequence[tuple[LadderStep, Contender]],
        incumbent: Contender,
        first: LadderStep | None = None,
    ) -> Contender | None:
        """Times all against the incumbent, interleaved, and notes what came of each; the best that pays is kept.

        Args:
            first: the incumbent's own step, where it has no times yet.
        """
        start = time.perf_counter()
        timings, failures = self._timed([incumbent.record, *(contender.record for _, contender in built)])
        share = (time.perf_counter() - start) / len(built)
        if first:
            _note_timing(first, timings.get(incumbent.record["name"]), None)
        gains: dict[str, SpeedUp] = {}
        for step, contender in built:
            name = contender.record["name"]
            timing = timings.get(name)
            step["seconds"] += share
            ratio = self.objective.gain(
                incumbent.record["name"],
                self._held(incumbent.record),
                self._held(contender.record),
                timing["speed_up"] if timing else None,
            )
            _note_timing(step, timing, ratio)
            if timing is None or ratio is None:
                step["reason"] = f"it could not be timed: {failures.get(name, 'the incumbent failed')}"
                continue
            gains[name] = ratio
        worth = {name: ratio for name, ratio in gains.items() if self.objective.reached(ratio)}
        best = max(worth, key=lambda name: worth[name]["ratio"], default=None)
        for step, contender in built:
            name = contender.record["name"]
            if name in gains:
                kept = name == best
                step.update({"status": "kept" if kept else "reverted", "reason": self._why(gains[name], best, name)})
        return next((contender for _, contender in built if contender.record["name"] == best), None)

    def _timed(self, records: Sequence[EngineRecord]) -> tuple[dict[str, Timing], dict[str, str]]:
        job, signature = self.shop.job, self.shop.model.signature
        sizes = self.objective.sizes(signature)
        return race(job.folder, records, self.shop.data.first(), signature, job.recipe, sizes, job.stages.update)

    def _why(self, gain: SpeedUp, best: str | None, name: str) -> str:
        found = self.objective.describe(gain, self._size())
        if name == best:
            return found
        if self.objective.reached(gain):
            return f"{found}; {best} is better still"
        bound = f"at most {1 / self.objective.threshold:.0%}" if self.objective.kind == "size" else None
        return f"{found}, which has to {'be ' + bound if bound else f'lie above {self.objective.threshold:g}'}"

    def _held(self, record: EngineRecord) -> int:
        """What an engine's size is for the objective."""
        return held_bytes(record, self.shop.model.signature)

    def _size(self) -> str:
        signature = self.shop.model.signature
        return f"size with the caches of {most_rows(signature)} rows" if signature.states else "size"

    def _asked(self, built: Sequence[tuple[LadderStep, Contender]], *, asked: bool) -> Contender | None:
        """Without a clock only what the user asked for stays."""
        for step, _ in built:
            reason = "it cannot be timed on this machine" + (", and was asked for" if asked else "")
            step.update({"status": "not measured" if asked else "skipped", "reason": reason})
        return built[0][1] if built and asked else None

    def _step(self, rung: Rung, what: str, name: str, status: str, reason: str, variant: Variant) -> LadderStep:
        return new_step(variant.target.name, rung.name, what, name, status, reason)


def new_step(target: str, rung: str, what: str, candidate: str, status: str, reason: str) -> LadderStep:
    """A record without numbers."""
    return LadderStep(
        target=target,
        step=rung,
        what=what,
        candidate=candidate,
        status=status,  # type: ignore[typeddict-item]
        reason=reason,
        ratio=None,
        p50_ms=None,
        samples_per_s=None,
        size_bytes=0,
        relative_l2=None,
        budget=None,
        seconds=0.0,
        resumed=False,
    )


def difference(variant: Variant, incumbent: Variant) -> str:
    """What a variant has that the incumbent has not: options of the target, the precision, passes."""
    mine, theirs = variant.target.options(), incumbent.target.options()
    options = [f"{name}={_shown(value)}" for name, value in mine.items() if value != theirs.get(name)]
    before = {str(rewrite) for rewrite in incumbent.passes}
    passes = [str(rewrite) for rewrite in variant.passes if str(rewrite) not in before]
    precision = [variant.precision] if variant.precision != incumbent.precision else []
    return " ".join([*precision, *options, *passes]) or variant.precision


def _shown(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _own(records: Sequence[PassRecord], variant: Variant, incumbent: Variant) -> list[PassRecord]:
    """The records of passes that the incumbent does not have; of those that quantize, where there are such."""
    before = {str(rewrite) for rewrite in incumbent.passes}
    new = [record for record in records if record["text"] not in before]
    quantizing = [record for record in new if split(record["text"])[0].startswith("quantize-")]
    return quantizing or new


def worst_error(validation: Validation) -> float | None:
    """The largest relative L2 of the outputs; None where one has none."""
    errors = [output["relative_l2"] for output in validation["outputs"]]
    known = [error for error in errors if error is not None]
    return max(known) if known and len(known) == len(errors) else None


def _note_timing(step: LadderStep, timing: Timing | None, ratio: SpeedUp | None) -> None:
    step["ratio"] = ratio
    if timing:
        step.update({"p50_ms": timing["p50_ms"], "samples_per_s": timing["samples_per_s"]})
