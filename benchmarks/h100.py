"""The proof on one GPU: five models against every peer, interleaved, on the same inputs, by host and device time.

A row is a model at a batch size. Its steps run in processes of their own, so that one that fails, crashes or hangs is
told with its reason and no more: the peers are exported, converted and built, enginesmith's engines too, and all are
tried once; then one process opens all of them and times them. What a step leaves in --work is taken again by the next
run; a row that was measured is in the results at once. torch.compile and TensorRT search for kernels by timing them, so
that --jobs above 1 makes it less exact. Two runs with different --models, one on each GPU of a machine, may add to the
same file.

Exits with 1 where a row misses a goal.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _results import RESULTS, command, write
from gpu import measure, own, peers
from gpu.peers import Step
from gpu.row import Row
from measured import MODELS

MODELS_MEASURED = ("resnet50", "vit_b16", "bert_base", "dlrm", "lstm_tagger")
MEASURE, PREPARE = "measure", "prepare"
ESTIMATES_S = {
    PREPARE: 25, "torch": 20, "torch.compile": 50, "max-autotune": 180, "onnxruntime": 35, "optimizer": 45,
    "tensorrt": 90, "fp16": 100, "fused": 100, "int8": 150, "fp8": 100, MEASURE: 90,
}  # fmt: skip
"""Seconds that a step takes about, by its name or its last word; a ladder takes its own time limit."""


def main() -> int:
    options = parse_options()
    rows = [
        Row(name, batch, options.device, options.work)
        for name in options.models
        for batch in options.batches or MODELS[name].batches
    ]
    if options.task:
        return run_task(next(row for row in rows if row.name == options.task[0]), options.task[1], options)
    for row in rows:
        row.folder.mkdir(parents=True, exist_ok=True)
    ahead = {model: wanted([row for row in rows if row.model == model], options) for model in options.models}
    tell_estimate(ahead, rows, options)
    for model, tasks in ahead.items():
        run_all([task for task in tasks if task[1] == PREPARE], options, 1)
        run_all([task for task in tasks if task[1] != PREPARE], options, options.jobs)
        for row in rows:
            if row.model == model and not options.prepare_only:
                run_all([(row, MEASURE)], options, 1)
                keep(row, options.out)
    if options.prepare_only:
        return 0
    found = json.loads(options.out.read_text())["results"] if options.out.exists() else {}
    reached = [row.name in found and measure.show(found[row.name]) for row in rows]
    return 0 if all(reached) else 1


def parse_options() -> argparse.Namespace:
    def several(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "h100.json")
    parser.add_argument("--work", type=Path, default=Path("/tmp/enginesmith-h100"), help="folder of what steps leave")
    parser.add_argument("--models", type=several, default=list(MODELS_MEASURED))
    parser.add_argument("--batches", type=numbers, help="default: those of each model")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu shows that all works, in fp32")
    parser.add_argument("--steps", type=several, help="only these, by name or its first words, as torch or enginesmith")
    parser.add_argument("--targets", nargs="+", help="of enginesmith, with options")
    parser.add_argument("--kinds", type=several, default=[*own.KINDS[:4]], help=f"of {', '.join(own.KINDS)}")
    parser.add_argument("--effort", default="quick", help="of the ladder")
    parser.add_argument("--ladder-limit", type=float, default=300, metavar="SECONDS", help="of one target on one row")
    parser.add_argument("--jobs", type=int, default=1, help="steps at once")
    parser.add_argument("--step-limit", type=float, default=600, metavar="SECONDS", help="end a step after this")
    parser.add_argument("--time-limit", type=float, default=7200, metavar="SECONDS", help="begin no step after this")
    parser.add_argument("--prepare-only", action="store_true", help="build, and measure in a later run")
    parser.add_argument("--retry", action="store_true", help="repeat steps that failed before")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--task", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.targets = tuple(options.targets or own.TARGETS[options.device])
    options.deadline = time.monotonic() + options.time_limit
    return options


def steps(row: Row, options: argparse.Namespace, kinds: Sequence[str]) -> dict[str, Step]:
    """The steps of a row that can run on the device, by name; ours begin with "enginesmith"."""
    ours = own.steps(row, options.targets, kinds, effort=options.effort, time_limit_s=options.ladder_limit)
    found = {**peers.steps(row), **ours}
    return {name: step for name, step in found.items() if options.device == "cuda" or not step.needs_gpu}


def is_named(name: str, step: str) -> bool:
    """Whether a step has this name, or one that goes on after these words or options."""
    return name == step or name.startswith((f"{step} ", f"{step},"))


def wanted(rows: Sequence[Row], options: argparse.Namespace) -> list[tuple[Row, str]]:
    """The steps that are asked for and were not done before."""

    def is_wanted(row: Row, name: str) -> bool:
        named = options.steps is None or name == PREPARE or any(is_named(name, step) for step in options.steps)
        done = record(row, name)
        return named and (done is None or (options.retry and bool(done["problem"])))

    every = [(row, name) for row in rows for name in (PREPARE, *steps(row, options, options.kinds))]
    return [(row, name) for row, name in every if is_wanted(row, name)]


def record(row: Row, name: str) -> dict[str, Any] | None:
    """What a step left; None where it did not run."""
    file = record_file(row, name)
    return json.loads(file.read_text()) if file.exists() else None


def record_file(row: Row, name: str) -> Path:
    return row.folder / (re.sub(r"[^\w.-]+", "-", name) + ".json")


def tell_estimate(ahead: Mapping[str, Sequence[Any]], rows: Sequence[Row], options: argparse.Namespace) -> None:
    """How long all will take, as far as the table of estimates knows; steps side by side slow each other down."""
    names = [name for tasks in ahead.values() for _, name in tasks]
    ladder_s = options.ladder_limit + 60
    steps_s = sum(ESTIMATES_S.get(name) or ESTIMATES_S.get(name.split()[-1], ladder_s) for name in names)
    rows_s = 0 if options.prepare_only else ESTIMATES_S[MEASURE] * len(rows)
    alone, shared = (f"{seconds / 60:.0f}" for seconds in (steps_s + rows_s, steps_s / options.jobs + rows_s))
    least = f", {shared} with {options.jobs} at once at the least" if options.jobs > 1 else ""
    print(f"{len(names)} steps and {len(rows)} rows, about {alone} min one after the other{least}", flush=True)


def run_all(tasks: Sequence[tuple[Row, str]], options: argparse.Namespace, jobs: int) -> None:
    """Runs tasks in processes, so many at once."""
    ahead, running = list(tasks), list[tuple[Row, str, subprocess.Popen[bytes], float]]()
    while ahead or running:
        while ahead and len(running) < jobs:
            row, name = ahead.pop(0)
            if time.monotonic() > options.deadline:
                print(f"{row.name}: {name}: left out, the time limit has passed", flush=True)
                continue
            running.append((row, name, launch(row, name, jobs), time.monotonic()))
        time.sleep(0.2)
        for task in list(running):
            row, name, process, began = task
            seconds = time.monotonic() - began
            if process.poll() is None and seconds < options.step_limit:
                continue
            running.remove(task)
            finish(row, name, process, seconds)


def launch(row: Row, name: str, jobs: int) -> subprocess.Popen[bytes]:
    """Starts a task; those that run side by side share the processors."""
    words = [word for word in sys.argv[1:] if word != "--retry"]
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(row.work / "inductor")),
        "ENGINESMITH_CACHE": os.environ.get("ENGINESMITH_CACHE", str(row.work / "cache")),
    }
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // (2 * jobs)))
    record_file(row, name).unlink(missing_ok=True)
    with record_file(row, name).with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, __file__, *words, "--task", row.name, name],
            stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip


def finish(row: Row, name: str, process: subprocess.Popen[bytes], seconds: float) -> None:
    """Takes the result of a task; one that left none, or is still running, has failed."""
    problem = ""
    if process.poll() is None:
        problem = f"stopped after {seconds:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = record(row, name)
    if done is None or problem:
        code = process.returncode
        ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        log = record_file(row, name).with_suffix(".log").read_text(errors="replace")
        ended += "".join(f", last said {line[:160]}" for line in list(filter(str.strip, log.splitlines()))[-1:])
        done = {"problem": problem or ended, "candidates": {}, "facts": {}}
    done["seconds"] = round(seconds, 1)
    record_file(row, name).write_text(json.dumps(done, indent=1) + "\n")
    said = done["problem"].splitlines()[0][:200] if done["problem"] else "done"
    print(f"{row.name}: {name}: {said}, {seconds:.0f} s", flush=True)


def run_task(row: Row, name: str, options: argparse.Namespace) -> int:
    """In the task's own process: prepares, tries every candidate once, and writes down what came of it."""
    done: dict[str, Any] = {"problem": "", "candidates": {}, "facts": {}}
    with contextlib.ExitStack() as stack:
        try:
            if name == PREPARE:
                row.prepare()
            elif name == MEASURE:
                every = steps(row, options, own.KINDS)
                known = {step: found for step in every if (found := record(row, step))}
                done["facts"] = measure.measure(row, every, known, stack, rounds=options.rounds)
            else:
                step = steps(row, options, own.KINDS)[name]
                done["facts"] = step.prepare(row)
                done["candidates"] = {key: tried(row, opener) for key, opener in step.candidates(row).items()}
        except Exception as error:  # noqa: BLE001, a step boundary: whatever a peer raises is its result
            traceback.print_exc()
            done["problem"] = str(error) or type(error).__name__
        record_file(row, name).write_text(json.dumps(done, indent=1) + "\n")
    return bool(done["problem"])


def tried(row: Row, opener: Any) -> dict[str, Any]:
    """The error of a candidate, or why it does not run."""
    try:
        runner = opener()
        try:
            return {"relative_l2": row.error(runner), "problem": ""}
        finally:
            runner.close()
    except Exception as error:  # noqa: BLE001, as above
        traceback.print_exc()
        return {"relative_l2": None, "problem": str(error) or type(error).__name__}


def keep(row: Row, out: Path) -> None:
    """Adds a row to the results; another run may do so at the same time."""
    done = record(row, MEASURE)
    if done is None or done["problem"]:
        print(f"{row.name}: not measured: {done['problem'] if done else 'the time limit has passed'}", flush=True)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = json.loads(out.read_text())["results"] if out.exists() else {}
        found[row.name] = {"command": command(), **done["facts"]}
        write("h100", found, out)
    out.with_suffix(".lock").unlink(missing_ok=True)


if __name__ == "__main__":
    raise SystemExit(main())
