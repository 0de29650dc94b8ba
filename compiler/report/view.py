"""What the report says about a manifest: the verdict in words, and rows in the order in which a reader needs them."""

from __future__ import annotations

import dataclasses
import keyword
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..manifest import Benchmark, EngineRecord, Manifest, OutputMetrics, PassRecord, SpeedUp, Timing, Validation
from ..ranking import decisive, objective_of
from ..signature import Signature
from .choices import choices
from .numbers import ABSENT, TIMES, error, number, ratio


@dataclasses.dataclass(frozen=True)
class Figure:
    """One of the few numbers beside the verdict."""

    label: str
    value: str
    note: str


State = Literal["passed", "unproven", "failed"]

WORDS: Mapping[State, str] = {"passed": "PASS", "unproven": "BUILT", "failed": "FAIL"}
"""The verdict in a word; "unproven" where engines were built and none could be judged on this machine."""

UNPROVEN = "no engine ran on this machine, so none was compared with the reference"

RATIO = "The speed-up is the median of the rounds' ratios, and need not equal the quotient of two times."


@dataclasses.dataclass(frozen=True)
class Headline:
    """The verdict for somebody who reads nothing else."""

    state: State
    word: str
    sentence: str
    lede: str
    reasons: tuple[str, ...]
    figures: tuple[Figure, ...]


@dataclasses.dataclass(frozen=True)
class Group:
    """The timings at one size of the dynamic axes."""

    title: str
    optimum: bool
    timings: tuple[Timing, ...]


def headline(manifest: Manifest) -> Headline:
    """The verdict with what led to it."""
    state = state_of(manifest)
    failed = state == "failed"
    reasons = _reasons(manifest) if failed else ()
    best = best_engine(manifest)
    timing = _timing(manifest, best)
    praise = UNPROVEN if state == "unproven" else _praise(best, timing)
    sentence = reasons[0] if failed else praise
    interval = _interval(timing["speed_up"]) if timing and timing["speed_up"] else ""
    random = "Inputs were random." if manifest["data"].get("random") else ""
    words = (f"Even so, {praise}." if failed and best else "", interval, _tally(manifest["engines"]), random)
    figures = _figures(manifest, best, timing)
    return Headline(state, WORDS[state], sentence, " ".join(filter(None, words)), reasons[1:], figures)


def state_of(manifest: Manifest) -> State:
    """The state of the verdict. What is not said in so many words is a failure: a broken manifest never reads PASS."""
    verdict = manifest["verdict"]
    if verdict.get("passed") is not True or verdict.get("state") not in ("passed", "unproven"):
        return "failed"
    return "passed" if verdict["state"] == "passed" else "unproven"


def best_engine(manifest: Manifest) -> str | None:
    """The engine that the verdict names; where it names none, the fastest valid one at the optimum size."""
    if isinstance(named := manifest["verdict"].get("best"), str):
        return named
    valid = {e["name"] for e in _kept(manifest["engines"]) if e["validation"] and e["validation"]["passed"]}
    candidates = [t for t in optimum(manifest) if t["candidate"] in valid and math.isfinite(t["p50_ms"] or math.nan)]
    return min(candidates, key=lambda t: t["p50_ms"])["candidate"] if candidates else None


def optimum(manifest: Manifest) -> tuple[Timing, ...]:
    """The timings at the size that engines are tuned for, or at the first size where that one was not measured."""
    found = groups(manifest)
    return next((group.timings for group in found if group.optimum), found[0].timings if found else ())


def groups(manifest: Manifest) -> tuple[Group, ...]:
    """All timings by size, the smallest batch first."""
    benchmark, signature = manifest["benchmark"], read_signature(manifest)
    tuned = signature.sizes() if signature else {}
    by_title: dict[str, list[Timing]] = {}
    for timing in sorted(benchmark["timings"] if benchmark else (), key=lambda t: t["batch"]):
        by_title.setdefault(size_label(timing), []).append(timing)
    return tuple(
        Group(title, bool(tuned) and timings[0]["sizes"] == tuned, tuple(timings))
        for title, timings in by_title.items()
    )


def size_label(timing: Timing) -> str:
    """The sizes of the dynamic axes in words: "batch 8, length 128"."""
    return ", ".join(f"{axis} {size}" for axis, size in timing["sizes"].items()) or f"batch {timing['batch']}"


def wrong_engines(engines: Sequence[EngineRecord]) -> tuple[str, ...]:
    """Names of the engines that failed validation, but for those that are dropped."""
    judged = [(engine["name"], engine["validation"]) for engine in _kept(engines)]
    return tuple(name for name, validation in judged if validation and not validation["passed"])


def floor_of(validation: Validation, output: str) -> OutputMetrics | None:
    """The noise floor of one output."""
    return next((floor for floor in validation["noise_floor"] if floor["output"] == output), None)


def measured(benchmark: Benchmark | None, field: str) -> bool:
    """Whether any timing has a value for an optional field, so that empty columns can be left out."""
    return any(timing.get(field) is not None for timing in (benchmark["timings"] if benchmark else ()))


def sections(manifest: Manifest) -> tuple[str, ...]:
    """The page's sections, for its navigation."""
    precision = ("precision",) if manifest["calibration"] or lowerings(manifest) else ()
    pruning = ("pruning",) if prunings(manifest) else ()
    found = tuple(name for name, shown in searched(manifest).items() if shown)
    last = ("stages", "passes", "capture", "engines", "environment", "use")
    return ("model", "speed", "accuracy", *found, *pruning, *precision, *last)


def searched(manifest: Manifest) -> dict[str, bool]:
    """Which sections there are of what was found out where it was asked for."""
    return {
        "search": bool((ladder := manifest.get("ladder")) and ladder["steps"]),
        "trade-off": len(choices(manifest).timed) > 1,
        "batch-size": bool(manifest.get("batches")),
        "roofline": bool(manifest.get("roofline")),
        "service": bool(manifest.get("services")),
    }


def lowerings(manifest: Manifest) -> list[PassRecord]:
    """The passes that chose ranges or precisions."""
    return [record for record in manifest["passes"] if record["details"].keys() & {"curve", "limits", "trials"}]


def prunings(manifest: Manifest) -> list[PassRecord]:
    """The passes that removed channels, neurons or heads."""
    return [record for record in manifest["passes"] if "prune" in record["details"]]


def passes_by_variant(passes: Sequence[PassRecord]) -> dict[str, list[PassRecord]]:
    """The passes of each variant of the graph, in the order in which they ran."""
    variants: dict[str, list[PassRecord]] = {}
    for record in passes:
        variants.setdefault(record["variant"], []).append(record)
    return variants


def refusals_by_reason(refusals: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Nodes by the reason for which a rule left them alone; a refusal about the whole graph names no node."""
    reasons: dict[str, list[str]] = {}
    for refusal in refusals:
        nodes = reasons.setdefault(refusal["reason"], [])
        if refusal.get("node"):
            nodes.append(refusal["node"])
    return reasons


def read_signature(manifest: Manifest) -> Signature | None:
    """The signature, None where the compile ended before there was one."""
    return Signature.from_json(manifest["signature"]) if manifest["signature"] else None


def call_example(signature: Signature | None) -> str:
    """Python that loads the bundle and calls the best engine."""
    lines = ["import enginesmith", "", 'model = enginesmith.load("path/to/this/folder")']
    if signature is None:
        return "\n".join([*lines, "outputs = model(...)"])
    named = all(spec.name.isidentifier() and not keyword.iskeyword(spec.name) for spec in signature.inputs)
    lines.append("outputs = model(" if named else "outputs = model(**{")
    for spec in signature.inputs:
        argument = f"{spec.name}=array," if named else f"{spec.name!r}: array,"
        lines.append(f"    {argument}  # {spec.dtype} {signature.describe(spec)}")
    return "\n".join([*lines, ")" if named else "})"])


def source_name(source: Mapping[str, Any]) -> str:
    """What to call the model in the title."""
    return str(source.get("model") or source.get("kind") or "a model")


def _kept(engines: Sequence[EngineRecord]) -> list[EngineRecord]:
    return [engine for engine in engines if not engine["dropped"]]


def _timing(manifest: Manifest, name: str | None) -> Timing | None:
    """That which decides, at the largest batch where engines were compiled for throughput."""
    signature, objective = read_signature(manifest), objective_of(manifest.get("ladder"))
    if signature and (found := decisive(manifest["benchmark"], signature, objective)):
        return found.get(name or "")
    return next((timing for timing in optimum(manifest) if timing["candidate"] == name), None)


def _praise(best: str | None, timing: Timing | None) -> str:
    if best is None:
        return UNPROVEN
    if timing is None:
        return f"{best} gives the right results; its speed was not measured"
    where, speed_up = f"at {size_label(timing)}", timing["speed_up"]
    if speed_up is None or not math.isfinite(speed_up["ratio"]):
        return f"{best} takes {number(timing['p50_ms'])} ms {where}"
    if speed_up["low"] <= 1 <= speed_up["high"]:
        return f"{best} is as fast as {speed_up['against']} {where}, within the error of measurement"
    pace = "times as fast as" if speed_up["ratio"] > 1 else "times the speed of"
    return f"{best} runs {ratio(speed_up['ratio']).rstrip(TIMES)} {pace} {speed_up['against']} {where}"


def _interval(speed_up: SpeedUp) -> str:
    return f"The 95 % interval of the speed-up is {ratio(speed_up['low'])} to {ratio(speed_up['high'])}."


def _tally(engines: Sequence[EngineRecord]) -> str:
    validated = [engine for engine in _kept(engines) if engine["validation"]]
    right = sum(bool(engine["validation"] and engine["validation"]["passed"]) for engine in validated)
    words = []
    if validated:
        words.append(f"{right} of {len(validated)} engines that ran agree with the reference")
    for status, text in (("built", "built but not run"), ("unavailable", "unavailable here"), ("failed", "failed")):
        if count := sum(engine["status"] == status for engine in engines):
            words.append(f"{count} {text}")
    if dropped := len(engines) - len(_kept(engines)):
        words.append(f"{dropped} dropped")
    return ", ".join(words) + "." if words else ""


def _reasons(manifest: Manifest) -> tuple[str, ...]:
    given = (str(reason).strip().partition("\n")[0] for reason in manifest["verdict"].get("reasons") or ())
    if lines := tuple(filter(None, given)):
        return lines
    if wrong := wrong_engines(manifest["engines"]):
        return (f"{', '.join(wrong)} failed validation",)
    if manifest["capture"]["exporter"] is None and manifest["capture"]["attempts"]:
        return ("the model could not be captured",)
    return ("no engine was proven right",)


def _figures(manifest: Manifest, best: str | None, timing: Timing | None) -> tuple[Figure, ...]:
    benchmark = manifest["benchmark"]
    figures = []
    if benchmark and timing:
        base = _timing(manifest, benchmark["baseline"])
        if speed_up := timing["speed_up"]:
            figures.append(Figure("Speed-up", ratio(speed_up["ratio"]), f"against {speed_up['against']}"))
        beside = f"baseline {number(base['p50_ms'])} ms" if base else f"p99 {number(timing['p99_ms'])} ms"
        figures.append(Figure("Latency, p50", f"{number(timing['p50_ms'])} ms", beside))
        beside = f"baseline {number(base['samples_per_s'])}" if base else size_label(timing)
        figures.append(Figure("Samples per second", number(timing["samples_per_s"]), beside))
    validation = next((e["validation"] for e in manifest["engines"] if e["name"] == best), None)
    if validation and validation["outputs"]:
        # NaN compares false with everything, so it must not be allowed to hide behind max().
        errors = [math.nan if o["relative_l2"] is None else o["relative_l2"] for o in validation["outputs"]]
        worst = math.nan if any(map(math.isnan, errors)) else max(errors)
        text = ABSENT if math.isnan(worst) else error(worst)
        figures.append(Figure("Relative error", text, f"{error(validation['tolerance']['relative_l2'])} allowed"))
    return tuple(figures)
