"""Climbs: from the captured graph of each target up to the engine that is worth keeping.

Every target begins with its plain engine in fp32. A rung's candidates are built, judged and raced against the
incumbent; the best that pays takes its place, all others are removed. What the passes of the recipe gain over the
captured graph is measured too, but they stay: all later steps build on them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from ..bundle import write_reproduction
from ..gains import problem
from ..manifest import EngineRecord, Ladder, LadderStep, PassRecord
from ..rewriting import Workshop
from .clock import LIMITS_S, Clock
from .memory import Memory, out_of_time
from .rungs import Rung, Situation, own_rungs, planners, remaining
from .trials import Contender, Evidence, Trials, difference, new_step, worst_error

if TYPE_CHECKING:
    from ..graph import Graph

START = "captured graph"
UNTIMED = "engines of this target cannot be timed on this machine; what you ask for by its own option is kept"

SLOW = "an engine takes too long to build to have one of the captured graph too; all later steps build on it"
SLOW_SHARE = 0.1
"""Share of the time that one build may take for the captured graph to be built beside."""


def climb(
    shop: Workshop, graphs: tuple[Graph | None, Graph | None], evidence: Evidence, engines: list[EngineRecord]
) -> tuple[Ladder, list[PassRecord], dict[str, Graph]]:
    """Finds the best engine of each target that was built in fp32, and adds it to `engines`.

    Args:
        graphs: as captured, and after the recipe's passes.
        engines: that were built; their folders lie in the bundle's.

    Returns:
        The record, those of the passes of the engines that were added, and their graphs, as far as they are at hand.
    """
    recipe = shop.job.recipe
    clock = Clock(recipe.time_limit_s or LIMITS_S[recipe.effort], shop.job.stages.update)
    memory = Memory(shop.job, shop.model.fingerprint)
    captured, simplified = graphs
    trials = Trials(shop, simplified, evidence, clock)
    records = {engine["name"]: engine for engine in engines}
    starts = [
        Contender(variant, records[variant.name])
        for variant in shop.job.variants
        if variant.precision == "fp32" and not variant.steps
    ]
    steps: list[LadderStep] = []
    passes: list[PassRecord] = []
    picks: dict[str, str] = {}
    graphs_left: dict[str, Graph] = {}
    for number, start in enumerate(starts):
        clock.allot(len(starts) - number)
        own = _begun(trials, start, captured)
        pick = start if own[-1]["status"] == "failed" else _climbed(trials, memory, start, own)
        steps += own
        if pick is not start:
            pick = _settled(trials, pick, start, records)
            engines.append(pick.record)
            passes += pick.passes
            if graph := trials.kept_graph(pick.variant):
                graphs_left[pick.record["name"]] = graph
        if pick.record["status"] in ("ready", "built"):
            picks[start.variant.name.replace("-fp32", "")] = pick.record["name"]
    found = Ladder(
        objective=str(trials.objective),
        effort=recipe.effort,
        time_limit_s=clock.limit_s,
        seconds=clock.spent_s,
        complete=not any(map(out_of_time, steps)),
        picks=picks,
        steps=steps,
    )
    return found, passes, graphs_left


def _begun(trials: Trials, start: Contender, captured: Graph | None) -> list[LadderStep]:
    """The captured graph, and what the recipe's passes make of it; the last step has failed where nothing is right."""
    record, variant = start.record, start.variant
    first = new_step(variant.target.name, START, str(variant.target), variant.name, "start", record["reason"])
    first["size_bytes"] = record["size_bytes"]
    if record["status"] == "built":
        return [first]
    if record["status"] == "ready":
        trials.judge(record)
    validation = record["validation"]
    if validation is None or not validation["passed"]:
        reason = f"not close enough: {problem(validation)}" if validation else record["reason"]
        return [{**first, "status": "failed", "reason": reason}]
    first["relative_l2"] = worst_error(validation)
    texts = " ".join(map(str, trials.shop.job.passes))
    if captured is None or variant.target.capabilities.consumes != "graph" or not texts:
        trials.measure(first, start)
        return [first]
    if (record["build_s"] or 0.0) > SLOW_SHARE * trials.clock.left_s:
        trials.measure(first, start)
        step = new_step(variant.target.name, "simplify", texts, variant.name, "not measured", SLOW)
        return [first, step]
    plain = dataclasses.replace(variant, name=f"{variant.target.name}-captured")
    trials.clock.tell(f"{variant.name}: simplify", 1)
    built = trials.build(plain, captured)
    step = new_step(variant.target.name, "simplify", texts, variant.name, "kept", "")
    step.update({"size_bytes": record["size_bytes"], "relative_l2": first["relative_l2"]})
    if built.record["status"] != "ready":
        step["reason"] = f"the captured graph cannot be built as it is: {built.record['reason']}"
        return [first, step]
    if trials.race([(step, start)], built, first) is None:
        step.update({"status": "kept", "reason": f"{step['reason']}; it stays, as all later steps build on it"})
    first.update({"candidate": plain.name, "size_bytes": built.record["size_bytes"]})
    trials.remove(built)
    return [first, step]


def _climbed(trials: Trials, memory: Memory, start: Contender, steps: list[LadderStep]) -> Contender:
    """All rungs of a target; adds to `steps`, and gives the engine that is left."""
    recipe, incumbent = trials.shop.job.recipe, start
    decodes = bool(trials.shop.model.signature.states)
    planned = list(planners(start.variant.target, recipe))
    while planned:
        situation = Situation(recipe, incumbent.variant, steps, decodes)
        ahead = remaining(planned, situation)
        incumbent = _step_up(trials, memory, planned.pop(0)(situation), incumbent, start, steps, ahead)
    situation = Situation(recipe, incumbent.variant, steps, decodes)
    rungs = [rung.name for rung in own_rungs(situation)]
    for number, name in enumerate(rungs):
        situation = Situation(recipe, incumbent.variant, steps, decodes)
        rung = next((rung for rung in own_rungs(situation) if rung.name == name), Rung(name))
        incumbent = _step_up(trials, memory, rung, incumbent, start, steps, len(rungs) - number)
    return incumbent


def _step_up(
    trials: Trials,
    memory: Memory,
    rung: Rung,
    incumbent: Contender,
    start: Contender,
    steps: list[LadderStep],
    ahead: int,
) -> Contender:
    """One rung: the engine that is the incumbent after it."""
    timed = start.record["status"] == "ready"
    if rung.candidates and not timed and not rung.asked:
        what = ", ".join(difference(variant, incumbent.variant) for variant in rung.candidates)
        steps.append(new_step(start.variant.target.name, rung.name, what, "", "skipped", UNTIMED))
        return incumbent
    rung = _named(rung, trials.names())
    known = memory.recall(rung, incumbent.variant) if timed else None
    found, winner = known or trials.run(rung, incumbent, ahead, timed=timed)
    if timed and known is None:
        memory.keep(rung, incumbent.variant, found, winner)
    steps += found
    if winner is None:
        return incumbent
    if incumbent is not start:
        trials.remove(incumbent, superseded=True)
    return winner


def _named(rung: Rung, taken: Collection[str]) -> Rung:
    """The rung with names of its candidates that are not taken, numbered from the second on."""
    used, candidates = set(taken), []
    for variant in rung.candidates:
        name = _free(variant.name, used)
        used.add(name)
        candidates.append(dataclasses.replace(variant, name=name))
    return dataclasses.replace(rung, candidates=tuple(candidates))


def _free(name: str, taken: Collection[str]) -> str:
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(free for free in itertools.chain([name], numbered) if free not in taken)


def _settled(trials: Trials, pick: Contender, start: Contender, records: Collection[str]) -> Contender:
    """The pick under the plainest name that is free, with a script that builds it again."""
    plain = _free(re.sub(r"-tuned-\d+$", "-tuned", pick.variant.name), records)
    engines, old = trials.shop.job.folder / "engines", pick.variant.name
    folder = (engines / old).rename(engines / plain)
    info = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps({**info, "name": plain}, indent=1) + "\n")
    steps = [str(rewrite) for rewrite in (*trials.shop.job.passes, *pick.variant.steps)]
    log = (folder / "build.log").read_text().splitlines()
    write_reproduction(folder, str(pick.variant.target), pick.variant.precision, log, steps)
    sibling = start.record["name"] if trials.objective.kind == "latency" else None
    record = EngineRecord(**{**pick.record, "name": plain, "sibling": sibling})
    passes = tuple(PassRecord(**{**own, "variant": plain, "engines": [plain]}) for own in pick.passes)
    return Contender(dataclasses.replace(pick.variant, name=plain), record, passes)
