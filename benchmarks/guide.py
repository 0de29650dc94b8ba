"""The targets of the guide that this project grew from, on samples with a task metric: throughput, P99, utilisation.

Before: the trained model in eager torch in fp32, at the batch size that its recipe calls usual. After: the engine that
`compile` picks. P99 is that of both at the same batch size. Throughput and utilisation are those of the engine at the
batch size that the search found, the one with the most throughput whose P99 is no longer than that of before. All three
are timed in one interleaved benchmark. Adds to the results of other devices, and exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from _results import RESULTS, command, write

import enginesmith
from enginesmith.compiler.benchmark import Candidate, Settings, SizedInputs, benchmark
from enginesmith.compiler.benchmark.baselines import TorchEager
from enginesmith.compiler.data import open_data
from enginesmith.compiler.machine.environment import environment
from enginesmith.compiler.manifest import Timing
from enginesmith.compiler.recipe import read_recipe
from enginesmith.compiler.sources import Model
from enginesmith.compiler.trial import load, open_runner, sized
from enginesmith.targets import parse_target
from enginesmith.targets.base import Arrays, Bound, Runner

SAMPLES = Path(__file__).parents[1] / "samples"
THROUGHPUT, P99, UTILISATION = 2.0, 0.5, 85.0
"""At least so many times the throughput, at most that share of the P99, at least so many percent of the GPU."""

TARGETS = {"cpu": ("onnxruntime-cpu", "openvino"), "cuda": ("onnxruntime-cuda", "tensorrt")}
BEFORE, SAME, MORE = "torch eager", "engine, same batch", "engine, more at once"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A sample with the largest batch that the search may take, by device."""

    folder: str
    budget: str
    largest: Mapping[str, int]


GUIDE = {
    "image classification": Sample("digits", "metric=0.003", {"cpu": 256, "cuda": 8192}),
    "recommendation": Sample("recommendation", "metric=0.002", {"cpu": 4096, "cuda": 65536}),
}


class AtBatch:
    """A runner with inputs of its own, so that candidates at several batch sizes take turns in one benchmark."""

    def __init__(self, runner: Runner, inputs: Arrays) -> None:
        self._runner = runner
        self._inputs = inputs

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return self._runner.run(self._inputs)

    def bind(self, inputs: Arrays) -> Bound:
        return self._runner.bind(self._inputs)

    def reset(self) -> None:
        self._runner.reset()

    def close(self) -> None:
        self._runner.close()


def main() -> int:
    options = parse_options()
    found = json.loads(options.out.read_text())["results"] if options.out.exists() else {}
    for device in options.devices:
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        for task in options.tasks:
            with tempfile.TemporaryDirectory(prefix="enginesmith-") as folder:
                result = measure(GUIDE[task], device, Path(folder), options)
            found.setdefault(name, {})[task] = {"command": command(), "environment": environment(), **result}
            write("guide", found, options.out)
    for name, tasks in found.items():
        show(name, tasks)
    return (
        0 if all(goal["reached"] for tasks in found.values() for row in tasks.values() for goal in row["goals"]) else 1
    )


def parse_options() -> argparse.Namespace:
    def several(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "guide.json")
    parser.add_argument("--tasks", type=several, default=list(GUIDE))
    parser.add_argument("--devices", type=several, default=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    parser.add_argument("--ladder-limit", type=float, default=240, metavar="SECONDS")
    parser.add_argument("--rounds", type=int, default=20)
    return parser.parse_args()


def measure(sample: Sample, device: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    recipe = read_recipe(SAMPLES / sample.folder / "recipe.yaml")
    dynamic = [f"{text.rpartition('..')[0]}..{sample.largest[device]}" for text in recipe.dynamic]
    fields: dict[str, Any] = {
        "dynamic": dynamic,
        "targets": [name for name in TARGETS[device] if parse_target(name).availability().run],
        "budget": sample.budget,
        "precisions": ["auto"],
        "time_limit_s": options.ladder_limit,
    }
    model = load(recipe.model_copy(update={"dynamic": tuple(dynamic)}))
    inputs = open_data(recipe.data, model.signature).first()
    limit_ms = usual_p99_ms(model, device, inputs, options.rounds)
    bundle = enginesmith.compile(
        recipe=SAMPLES / sample.folder / "recipe.yaml", output=folder / "bundle", p99=f"{limit_ms:.4f}ms", **fields
    )
    engines = {engine["name"]: engine for engine in bundle.manifest["engines"]}
    pick = bundle.manifest["verdict"]["best"]
    curve = max(bundle.manifest["batches"], key=lambda curve: most(curve)["samples_per_s"] if most(curve) else 0.0)
    busiest, batch = curve["engine"], curve["best"] or curve["saturation"] or sample.largest[device]
    usual = sized(model.signature, inputs, model.signature.sizes())
    larger = sized(model.signature, inputs, {**model.signature.sizes(), curve["axis"]: batch})
    opener = functools.partial(open_runner, bundle.path)
    timings = timed(
        {
            BEFORE: (functools.partial(TorchEager, model, device), usual),
            SAME: (functools.partial(opener, engines[pick]), usual),
            MORE: (functools.partial(opener, engines[busiest]), larger),
        },
        options.rounds,
    )
    return {
        "asked": fields,
        "engines": {SAME: pick, MORE: busiest},
        "batches": {BEFORE: usual.batch, SAME: usual.batch, MORE: batch},
        "metric": {name: engines[name]["validation"]["metric"] for name in {pick, busiest}},
        "timings": timings,
        "goals": goals(timings, [engines[name] for name in {pick, busiest}], usual.batch, batch, device),
    }


def most(curve: Mapping[str, Any]) -> Any:
    """The point of the best batch of a curve."""
    return next((point for point in curve["points"] if point["batch"] == curve["best"]), None)


def usual_p99_ms(model: Model, device: str, inputs: Arrays, rounds: int) -> float:
    """P99 of torch before anything else: the latency that the search must keep."""
    usual = sized(model.signature, inputs, model.signature.sizes())
    return timed({BEFORE: (functools.partial(TorchEager, model, device), usual)}, rounds)[BEFORE]["p99_ms"]


def timed(candidates: Mapping[str, tuple[Any, SizedInputs]], rounds: int) -> dict[str, Timing]:
    """The candidates interleaved, each at its own batch."""
    made = [Candidate(name, functools.partial(at_batch, *given)) for name, given in candidates.items()]
    (_, first), *_ = candidates.values()
    result = benchmark(made, [first], baseline=BEFORE, protocol=Settings(rounds=rounds, slice_s=0.1, warmup_s=1.0))
    if result["skipped"]:
        raise RuntimeError(f"not all could be measured: {result['skipped']}")
    return {timing["candidate"]: timing for timing in result["timings"]}


def at_batch(opener: Any, inputs: SizedInputs) -> AtBatch:
    return AtBatch(opener(), inputs.arrays)


def goals(
    timings: Mapping[str, Timing], engines: list[Any], usual: int, larger: int, device: str
) -> list[dict[str, Any]]:
    """Each target with its number before and after."""
    before, same, more = (timings[name] for name in (BEFORE, SAME, MORE))
    was, now = (timing["requests_per_s"] * batch for timing, batch in ((before, usual), (more, larger)))
    old, new = before["p99_ms"], same["p99_ms"]
    found = [
        goal("samples/s", was, now, f"at least {THROUGHPUT:g} times", now >= THROUGHPUT * was),
        goal("P99 ms", old, new, f"at most {P99:.0%}", new <= P99 * old),
    ]
    if device == "cuda":
        used = more["gpu_utilization_percent"]
        reached = used is not None and used >= UTILISATION
        found.append(
            goal("GPU utilisation %", before["gpu_utilization_percent"], used, f"at least {UTILISATION:g}", reached)
        )
    for engine in engines:
        metric, budget = engine["validation"]["metric"], engine["validation"]["budget"]
        holds = engine["validation"]["passed"] and (budget is None or budget["holds"])
        found.append(goal(f"{metric['name']} of {engine['name']}", metric["reference"], metric["value"], "kept", holds))
    return found


def goal(what: str, before: float | None, after: float | None, wanted: str, reached: bool) -> dict[str, Any]:
    return {"what": what, "before": before, "after": after, "wanted": wanted, "reached": bool(reached)}


def show(device: str, tasks: Mapping[str, Any]) -> None:
    print(f"\n{device}\n{'task':22}{'':40}{'before':>12}{'after':>12}  wanted")
    for task, row in tasks.items():
        print(f"{task:22}batch {row['batches'][BEFORE]}, {row['batches'][MORE]} for throughput; {row['engines'][SAME]}")
        for one in row["goals"]:
            numbers = "".join(
                f"{'-' if one[key] is None else format(one[key], '.4g'):>12}" for key in ("before", "after")
            )
            print(f"{'':22}{one['what']:40}{numbers}  {one['wanted']}{'' if one['reached'] else ': MISSED'}")


if __name__ == "__main__":
    raise SystemExit(main())
