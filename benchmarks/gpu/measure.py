"""Times all candidates of a row in one process, and then the best of them once more, side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from enginesmith.compiler.benchmark import Candidate, Settings, SizedInputs, benchmark
from enginesmith.targets.base import Runner
from gpu.goals import EAGER, duellists, goals
from gpu.peers import Step
from gpu.row import FP16_BUDGET, Row

SLICE_S, WARMUP_S = 0.1, 0.6
TIMES = (
    *("p50_ms", "p99_ms", "mean_ms", "device_p50_ms", "device_p99_ms", "samples_per_s"),
    *("gpu_utilization_percent", "sm_clock_mhz", "speed_up", "iterations", "steady"),
)


def measure(
    row: Row, steps: Mapping[str, Step], known: Mapping[str, Any], stack: contextlib.ExitStack, *, rounds: int
) -> dict[str, Any]:
    """The result of a row.

    Args:
        stack: closes what is opened, which may crash and cost no result that was written before.
        known: what each step left that was run: the errors of its candidates, and why some do not run.
    """
    problems, facts, errors = dict[str, str](), dict[str, Any](), dict[str, float]()
    sized = [SizedInputs({}, row.batch, row.sample)]
    settings = Settings(rounds=rounds, slice_s=SLICE_S, warmup_s=WARMUP_S)
    runners: dict[str, Runner] = {}
    for name, done in known.items():
        if done["problem"]:
            problems[name] = done["problem"]
            continue
        facts[name] = {"seconds": done.get("seconds"), **done["facts"]}
        for key, opener in steps[name].candidates(row).items():
            tried = done["candidates"][key]
            if tried["problem"]:
                problems[key] = tried["problem"]
                continue
            print(f"opening {key}", flush=True)
            try:
                runners[key] = opener()
            except Exception as error:  # noqa: BLE001, a step boundary: what does not open any more is left out
                problems[key] = str(error) or type(error).__name__
                continue
            stack.callback(runners[key].close)
            errors[key] = tried["relative_l2"]
    first = benchmark([Candidate(key, runner) for key, runner in runners.items()], sized, baseline=EAGER,
                      protocol=settings)  # fmt: skip
    problems.update(first["skipped"])
    candidates = [
        {"name": timing["candidate"], "relative_l2": errors[timing["candidate"]]} | {key: timing[key] for key in TIMES}  # type: ignore[literal-required]
        for timing in first["timings"]
    ]
    roles = duellists(candidates, row.name)
    duel = None
    if "peer" in roles and "pick" in roles:
        names = dict.fromkeys([*roles.values(), EAGER])
        duel = benchmark([Candidate(key, runners[key]) for key in names], sized, baseline=roles["peer"],
                         protocol=settings, siblings={roles["pick"]: EAGER})  # fmt: skip
    ratios: dict[str, Any] = {t["candidate"]: t["speed_up"] for t in duel["timings"] if t["speed_up"]} if duel else {}
    for timing in duel["timings"] if duel else []:
        if timing["against_sibling"]:
            ratios["eager"] = timing["against_sibling"]
    return {
        "model": row.model,
        "batch": row.batch,
        "device": torch.cuda.get_device_name() if row.device == "cuda" else "CPU",
        "budget": FP16_BUDGET,
        "roles": roles,
        "goals": goals(row.name, roles, ratios),
        "candidates": candidates,
        "problems": problems,
        "facts": facts,
        "protocol": first["protocol"],
    }


def show(found: Mapping[str, Any]) -> bool:
    """Prints a row; returns whether it reaches all its goals."""
    print(f"\n{found['model']}, batch {found['batch']}, {found['device']}")
    columns = ("p50 ms", "p99 ms", "device ms", "p99 ms", "samples/s", "GPU %", "rel. L2", "x eager fp32")
    print(f"  {'':46}" + "".join(f"{column:>11}" for column in columns))
    for row in sorted(found["candidates"], key=lambda row: row["p50_ms"]):
        speed = row["speed_up"]["ratio"] if row["speed_up"] else 1.0
        numbers = (row["p50_ms"], row["p99_ms"], row["device_p50_ms"], row["device_p99_ms"])
        cells = [f"{number:11.3f}" if number is not None else f"{'-':>11}" for number in numbers]
        use = row["gpu_utilization_percent"]
        cells += [f"{row['samples_per_s']:11.0f}", f"{use:11.0f}" if use is not None else f"{'-':>11}"]
        cells += [f"{row['relative_l2']:11.1e}", f"{speed:11.2f}"]
        wrong = "" if row["relative_l2"] <= found["budget"] else "  beyond the budget of fp16"
        print(f"  {row['name']:46}" + "".join(cells) + wrong)
    for name, reason in found["problems"].items():
        print(f"  {name}: {reason.splitlines()[0][:160]}")
    for name, goal in found["goals"].items():
        ratio = goal["ratio"]
        told = f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "not measured"
        print(f"  {'reached' if goal['reached'] else 'MISSED '} {name}: {told}, {goal['what']}")
    return all(goal["reached"] for goal in found["goals"].values())
