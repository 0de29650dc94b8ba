"""Turns what was measured into checks, one a size, output or quantity, and these into a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..manifest import Benchmark, OutputMetrics, SpeedUp, Timing, Validation
from .records import Check, MetricChange, Results, SideRecord, State
from .rules import Rules

BAD = {
    "speed": ("slower", "fails"),
    "accuracy": ("worse",),
    "results": ("different",),
    "growth": ("larger",),
}
"""The verdicts of each kind of check that are regressions."""


def speed_checks(benchmark: Benchmark, rules: Rules) -> list[Check]:
    """One check for each size that A or B was timed at."""
    by_size: dict[tuple[tuple[str, int], ...], dict[str, Timing]] = {}
    for timing in benchmark["timings"]:
        by_size.setdefault(tuple(timing["sizes"].items()), {})[timing["candidate"]] = timing
    return [_speed(dict(sizes), pair, benchmark["skipped"], rules) for sizes, pair in by_size.items()]


def _speed(sizes: Mapping[str, int], pair: Mapping[str, Timing], skipped: Mapping[str, str], rules: Rules) -> Check:
    name = " ".join(f"{axis}={size}" for axis, size in sizes.items()) or "static"
    seconds = sum(timing["iterations"] * timing["mean_ms"] / 1000 for timing in pair.values())
    numbers: dict[str, float | None] = {
        f"{label.lower()}_{key}": timing[key]
        for label, timing in pair.items()
        for key in ("p50_ms", "p99_ms", "samples_per_s", "device_p50_ms")
    }
    ratio = pair["B"]["speed_up"] if "B" in pair else None
    if ratio is None:
        missing = "B" if "A" in pair else "A"
        reasons = (reason for key, reason in skipped.items() if key in (missing, f"{missing} {name}"))
        text = f"{missing} was not timed: {next(reasons, 'no reason is known')}"
        verdict = "fails" if missing == "B" else "not measured"
        return _check("speed", name, verdict, text, numbers, rules, seconds)
    numbers |= {"ratio": ratio["ratio"], "low": ratio["low"], "high": ratio["high"]}
    return _check("speed", name, speed_verdict(ratio, rules.tolerance_speed), _ratio(ratio), numbers, rules, seconds)


def speed_verdict(ratio: SpeedUp, tolerance: float) -> str:
    """What an interval says: the whole of it must lie on one side, or within the tolerance."""
    if ratio["low"] > tolerance:
        return "faster"
    if ratio["high"] < 1 / tolerance:
        return "slower"
    return "equal" if ratio["low"] >= 1 / tolerance and ratio["high"] <= tolerance else "unclear"


def accuracy_checks(results: Results, rules: Rules) -> list[Check]:
    """One check for each output of B, one for its budget, and one for the task metric."""
    checks = []
    own, other = results["b"], results["a"]
    if own is not None:
        theirs = {output["output"]: output for output in other["outputs"]} if other else {}
        checks += [_accuracy(output, theirs.get(output["output"]), own, rules) for output in own["outputs"]]
        if (budget := own["budget"]) is not None:
            value = budget["problem"] or f"measured {budget['value']}"
            verdict = "within bounds" if budget["holds"] else "worse"
            checks.append(
                _check("accuracy", f"budget {budget['text']}", verdict, value, {"value": budget["value"]}, rules)
            )
    if results["metric"] is not None:
        checks.append(_metric(results["metric"], rules))
    return checks


def _accuracy(b: OutputMetrics, a: OutputMetrics | None, own: Validation, rules: Rules) -> Check:
    error, before = b["relative_l2"], a["relative_l2"] if a else None
    numbers: dict[str, float | None] = {
        "b_relative_l2": error,
        "a_relative_l2": before,
        "allowed_relative_l2": own["tolerance"]["relative_l2"],
        "b_max_abs": b["max_abs"],
        "b_cosine": b["cosine"],
        "b_top1": b["top1"],
    }
    text = f"relative L2 {_number(error)} from the reference, A {_number(before)}"
    if not b["passed"]:
        return _check("accuracy", b["output"], "worse", f"{text}; {'; '.join(b['failures'])}", numbers, rules)
    if rules.tolerance_accuracy is not None and error is not None and before is not None:
        if not error - before <= rules.tolerance_accuracy:
            text += f"; {_number(error - before)} more than A, {rules.tolerance_accuracy:g} allowed"
            return _check("accuracy", b["output"], "worse", text, numbers, rules)
        text += f", {rules.tolerance_accuracy:g} more allowed"
    return _check("accuracy", b["output"], "within bounds", text, numbers, rules)


def _metric(found: MetricChange, rules: Rules) -> Check:
    numbers: dict[str, float | None] = {
        "a": found["a"],
        "b": found["b"],
        "change": found["change"],
        "low": found["low"],
        "high": found["high"],
        "rows": float(found["rows"]),
    }
    name = f"metric {found['name']}"
    if found["change"] is None or found["high"] is None:
        return _check("accuracy", name, "worse", f"B's is not finite, A's is {found['a']:.4f}", numbers, rules)
    text = (
        f"{found['b']:.4f}, A {found['a']:.4f}: change {found['change']:+.4f} "
        f"[{found['low']:+.4f}, {found['high']:+.4f}] on {found['rows']} rows"
    )
    verdict = "worse" if found["high"] < -rules.tolerance_metric else "within bounds"
    return _check("accuracy", name, verdict, text, numbers, rules)


def result_checks(results: Results, rules: Rules) -> list[Check]:
    """One check for each output: B's beside A's on the same inputs.

    Without any record of a reference A stands in for it, and other results are worse ones.
    """
    kind = "results" if results["b"] is not None else "accuracy"
    words = ("equal", "different") if kind == "results" else ("within bounds", "worse")
    checks = []
    for output in results["between"]:
        numbers: dict[str, float | None] = {key: output[key] for key in ("relative_l2", "max_abs", "cosine", "top1")}
        text = f"relative L2 {_number(output['relative_l2'])} from A's, {results['tolerance']['relative_l2']:g} allowed"
        text = text if output["passed"] else f"{text}; {'; '.join(output['failures'])}"
        name = output["output"] if kind == "results" else f"{output['output']} beside A's"
        checks.append(_check(kind, name, words[not output["passed"]], text, numbers, rules))
    return checks


def growth_checks(a: SideRecord, b: SideRecord, rules: Rules) -> list[Check]:
    """The size of the files, and the memory on the GPU where there is one."""
    checks = []
    sizes: tuple[tuple[str, int | None, int | None], ...] = (
        ("size of the engine", a["size_bytes"], b["size_bytes"]),
        ("GPU memory", a["gpu_memory_bytes"], b["gpu_memory_bytes"]),
    )
    for name, before, after in sizes:
        if not before or after is None:
            continue
        growth = after / before - 1
        numbers: dict[str, float | None] = {"a_bytes": before, "b_bytes": after, "growth": growth}
        text = f"{after / 1e6:.3g} MB, A {before / 1e6:.3g} MB: {growth:+.1%}"
        limit = rules.max_growth
        if limit is not None:
            text += f", {limit:.1%} allowed"
        verdict = "smaller" if growth < 0 else "larger" if growth > (limit or 0) else "equal"
        check = _check("growth", name, verdict, text, numbers, rules)
        if limit is None and check["state"] == "failed":
            check["state"] = "information"
        checks.append(check)
    return checks


def verdict(checks: Iterable[Check]) -> dict[str, Any]:
    """Good where no check failed; in words, what B is beside A."""
    checks = list(checks)
    speed = _overall([check["verdict"] for check in checks if check["kind"] == "speed"])
    wrong = [check for check in checks if check["kind"] == "accuracy" and check["verdict"] in BAD["accuracy"]]
    judged = any(check["kind"] == "accuracy" for check in checks)
    unlike = any(check["kind"] == "results" and check["verdict"] == "different" for check in checks)
    failed = [check for check in checks if check["state"] == "failed"]
    words = {
        "faster": "B is faster", "slower": "B is slower", "mixed": "B is faster at some sizes and slower at others",
        "equal": "B is as fast as A", "unclear": "no difference in speed was found", "fails": "B fails where A runs",
        "not measured": "speed was not measured",
    }  # fmt: skip
    accuracy = "worse" if wrong else "within bounds" if judged else "unknown"
    results = "different" if unlike or (wrong and not any(c["kind"] == "results" for c in checks)) else "equal"
    text = f"{words[speed]}; {'different' if results == 'different' else 'equal'} results"
    return {
        "passed": not failed,
        "text": text + (", beyond its bounds" if wrong else ""),
        "speed": speed,
        "accuracy": accuracy,
        "results": results,
        "reasons": [f"{check['kind']}, {check['name']}: {check['verdict']}: {check['text']}" for check in failed],
    }


def _overall(verdicts: list[str]) -> str:
    for word in ("fails", "slower"):
        if word in verdicts:
            return "mixed" if word == "slower" and "faster" in verdicts else word
    if "faster" in verdicts:
        return "faster"
    known = [word for word in verdicts if word != "not measured"]
    return "not measured" if not known else "equal" if set(known) == {"equal"} else "unclear"


def _check(
    kind: str, name: str, word: str, text: str, numbers: dict[str, float | None], rules: Rules, seconds: float = 0.0
) -> Check:
    state: State = "skipped" if word == "not measured" else "passed"
    if word in BAD[kind]:
        state = "failed" if kind in rules.fail_on else "information"
    return Check(kind=kind, name=name, verdict=word, state=state, text=text, numbers=numbers, seconds=seconds)


def _ratio(ratio: SpeedUp) -> str:
    return f"{ratio['ratio']:.3f} times as fast as A, 95 % interval {ratio['low']:.3f} to {ratio['high']:.3f}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2g}"
