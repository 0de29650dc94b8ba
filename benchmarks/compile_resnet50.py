"""Time and memory of compiling ResNet-50 for onnxruntime-cpu in fp32 with validation, and of compiling it again."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from _results import write

MODEL = str(Path(__file__).parent / "models.py:resnet50")
INPUT, DYNAMIC, TARGET = "image:1x3x224x224", "image:0=1..1..8", "onnxruntime-cpu"
COMPILE_LIMIT_S = 60.0
RECOMPILE_LIMIT_S = 3.0
MEMORY_LIMIT = 2.5
"""Extra memory as a multiple of the weights, beyond torch and the eager model that has run at the largest size."""

SAMPLE_EVERY_S = 0.02


def run_eager(weights: Path) -> dict[str, Any]:
    """What torch and the eager model hold by themselves; also leaves the model's weights in a file."""
    import models
    import torch
    from safetensors.torch import save_file

    model = models.resnet50()
    with torch.inference_mode():
        model(torch.from_numpy(models.resnet50_inputs(8)["image"]))
    held_bytes = psutil.Process().memory_info().rss
    save_file(model.state_dict(), weights)
    return {
        "held_bytes": held_bytes,
        "weight_bytes": sum(t.numel() * t.element_size() for t in model.state_dict().values()),
    }


def run_compile(weights: Path, output: Path) -> dict[str, Any]:
    """The compile, through the public API."""
    import enginesmith

    start = time.perf_counter()
    bundle = enginesmith.compile(
        MODEL, output, weights=str(weights), inputs=[INPUT], dynamic=[DYNAMIC], targets=[TARGET], benchmark=False
    )
    seconds = time.perf_counter() - start
    stages = {stage["name"]: stage["seconds"] for stage in bundle.manifest["stages"]}
    return {"compile_s": seconds, "stages_s": stages, "passed": bundle.passed, "cached": bundle.cached}


def measured(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Runs Python to its end: seconds and the highest memory of it and its children together, and what it printed."""
    start = time.perf_counter()
    peak = 0
    with (
        tempfile.TemporaryFile("w+") as printed,
        subprocess.Popen([sys.executable, *arguments], env=environment, stdout=printed) as process,
    ):
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, tree_bytes(watched))
            time.sleep(SAMPLE_EVERY_S)
        seconds = time.perf_counter() - start
        printed.seek(0)
        text = printed.read()
    if process.returncode:
        raise SystemExit(f"{arguments} ended with exit code {process.returncode}")
    return {"process_s": seconds, "peak_bytes": peak, "printed": text}


def tree_bytes(process: psutil.Process) -> int:
    """Resident memory of a process and its children. Pages that they share count for each, so it is never too low."""
    total = 0
    try:
        for member in (process, *process.children(recursive=True)):
            total += member.memory_info().rss
    except psutil.Error:  # one ended while it was looked at; the next sample sees the rest
        return 0
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=["eager", "compile"], help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        eagerly = options.stage == "eager"
        print(json.dumps(run_eager(options.weights) if eagerly else run_compile(options.weights, options.output)))
        return 0

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        environment = {**os.environ, "ENGINESMITH_CACHE": str(work / "cache")}
        weights = ["--weights", str(work / "resnet50.safetensors")]
        eager = measured([__file__, "--stage", "eager", *weights], environment)
        first = measured([__file__, "--stage", "compile", *weights, "--output", str(work / "first")], environment)
        command = ["-m", "enginesmith", "compile", MODEL, *weights, "--output", str(work / "again"), "--no-benchmark"]
        shapes = ["--input", INPUT, "--dynamic", DYNAMIC, "--target", TARGET, "--quiet"]
        again = measured([*command, *shapes], environment)
        manifests = [(work / name / "manifest.json").read_bytes() for name in ("first", "again")]
    held, compiled = (json.loads(run["printed"].splitlines()[-1]) for run in (eager, first))
    extra = first["peak_bytes"] - held["held_bytes"]
    results = {
        **compiled,
        "compile_process_s": first["process_s"],
        "compile_limit_s": COMPILE_LIMIT_S,
        "recompile_process_s": again["process_s"],
        "recompile_limit_s": RECOMPILE_LIMIT_S,
        "recompile_from_cache": manifests[0] == manifests[1],
        "weight_bytes": held["weight_bytes"],
        "eager_held_bytes": held["held_bytes"],
        "eager_peak_bytes": eager["peak_bytes"],
        "compile_peak_bytes": first["peak_bytes"],
        "extra_over_weights": extra / held["weight_bytes"],
        "extra_limit": MEMORY_LIMIT,
    }
    print(
        f"compile    {compiled['compile_s']:.1f} s, whole process {first['process_s']:.1f} s (limit {COMPILE_LIMIT_S})"
    )
    print(f"again      {again['process_s']:.2f} s, whole process through the CLI (limit {RECOMPILE_LIMIT_S})")
    print(f"memory     {results['extra_over_weights']:.2f} x the weights beyond torch and eager (limit {MEMORY_LIMIT})")
    write("compile_resnet50", results)
    good = (
        compiled["passed"]
        and results["recompile_from_cache"]
        and first["process_s"] < COMPILE_LIMIT_S
        and again["process_s"] < RECOMPILE_LIMIT_S
        and results["extra_over_weights"] < MEMORY_LIMIT
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
