"""Time and memory of compiling ResNet-50 for onnxruntime-cpu in fp32 with validation, of compiling it again, and the
time of finding its best engine: the ladder with ``--effort quick`` on ONNX Runtime and OpenVINO, from an empty cache.

Memory is the highest sum of resident memory over all processes. What the compile takes beyond torch's own is told as a
multiple of the weights, against three things that torch does by itself with the same model:

    export     its peak while torch.onnx.export exports the model, which every compile of a torch module goes through;
               the limit is for this one
    eager      its peak while it loads the model and runs it once at the largest size
    held       what it holds after that run
"""

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
LADDER_LIMIT_S = 300.0
MEMORY_LIMIT = 2.5
"""Extra memory as a multiple of the weights, beyond the peak of torch's own export."""

SAMPLE_EVERY_S = 0.02
EAGER_RUNS = 3
"""What the allocator keeps after the run differs by half the weights from process to process; the lowest counts."""


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


def run_export(weights: Path, folder: Path) -> dict[str, Any]:
    """torch's own export of the same model, after the same eager run."""
    import models
    import torch
    from safetensors.torch import load_file

    model = models.resnet50()
    model.load_state_dict(load_file(weights), assign=True)
    image = torch.from_numpy(models.resnet50_inputs(8)["image"])
    with torch.no_grad():
        model(image)
    batch = {0: torch.export.Dim("batch", min=1, max=8)}
    program = torch.onnx.export(model, (image[:2],), dynamo=True, dynamic_shapes=(batch,), verbose=False)
    assert program is not None
    folder.mkdir()
    program.save(folder / "model.onnx", external_data=True)
    return {}


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
    try:
        return sum(member.memory_info().rss for member in (process, *process.children(recursive=True)))
    except psutil.Error:  # one ended while it was looked at; the next sample sees the rest
        return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=["eager", "export", "compile"], help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        stages = {"export": run_export, "compile": run_compile}
        eagerly = options.stage == "eager"
        result = run_eager(options.weights) if eagerly else stages[options.stage](options.weights, options.output)
        print(json.dumps(result))
        return 0

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        environment = {**os.environ, "ENGINESMITH_CACHE": str(work / "cache")}
        weights = ["--weights", str(work / "resnet50.safetensors")]
        eager_runs = [measured([__file__, "--stage", "eager", *weights], environment) for _ in range(EAGER_RUNS)]
        eager = min(eager_runs, key=lambda run: int(json.loads(run["printed"].splitlines()[-1])["held_bytes"]))
        export = measured([__file__, "--stage", "export", *weights, "--output", str(work / "export")], environment)
        first = measured([__file__, "--stage", "compile", *weights, "--output", str(work / "first")], environment)
        command = ["-m", "enginesmith", "compile", MODEL, *weights, "--output", str(work / "again"), "--no-benchmark"]
        shapes = ["--input", INPUT, "--dynamic", DYNAMIC, "--target", TARGET, "--quiet"]
        again = measured([*command, *shapes], environment)
        targets = ["--target", TARGET, "--target", "openvino", "--precision", "auto", "--effort", "quick"]
        command = ["-m", "enginesmith", "compile", MODEL, *weights, "--output", str(work / "found"), "--quiet"]
        calibration = ["--random-calibration", *shapes[:4], *targets]
        ladder = measured([*command, *calibration], {**environment, "ENGINESMITH_CACHE": str(work / "other")})
        found = json.loads((work / "found" / "manifest.json").read_text())
        manifests = [(work / name / "manifest.json").read_bytes() for name in ("first", "again")]
    held, compiled = (json.loads(run["printed"].splitlines()[-1]) for run in (eager, first))

    def beyond(torch_bytes: int) -> float:
        return float((first["peak_bytes"] - torch_bytes) / held["weight_bytes"])

    results = {
        **compiled,
        "compile_process_s": first["process_s"],
        "compile_limit_s": COMPILE_LIMIT_S,
        "recompile_process_s": again["process_s"],
        "recompile_limit_s": RECOMPILE_LIMIT_S,
        "recompile_from_cache": manifests[0] == manifests[1],
        "ladder_process_s": ladder["process_s"],
        "ladder_limit_s": LADDER_LIMIT_S,
        "ladder": {key: found["ladder"][key] for key in ("effort", "seconds", "complete", "picks")},
        "weight_bytes": held["weight_bytes"],
        "eager_held_bytes": held["held_bytes"],
        "eager_peak_bytes": eager["peak_bytes"],
        "export_peak_bytes": export["peak_bytes"],
        "compile_peak_bytes": first["peak_bytes"],
        "weights_beyond_export": beyond(export["peak_bytes"]),
        "weights_beyond_eager": beyond(eager["peak_bytes"]),
        "weights_beyond_held": beyond(held["held_bytes"]),
        "weights_limit": MEMORY_LIMIT,
    }
    print(
        f"compile    {compiled['compile_s']:.1f} s, whole process {first['process_s']:.1f} s (limit {COMPILE_LIMIT_S})"
    )
    print(f"again      {again['process_s']:.2f} s, whole process through the CLI (limit {RECOMPILE_LIMIT_S})")
    print(f"ladder     {ladder['process_s']:.0f} s, whole process (limit {LADDER_LIMIT_S})")
    print(
        f"memory     {results['weights_beyond_export']:.2f} x the weights beyond torch's export (limit {MEMORY_LIMIT})"
    )
    print(f"           {results['weights_beyond_eager']:.2f} x beyond the peak of eager torch")
    print(f"           {results['weights_beyond_held']:.2f} x beyond what eager torch holds after its run")
    write("compile_resnet50", results)
    good = (
        compiled["passed"]
        and results["recompile_from_cache"]
        and first["process_s"] < COMPILE_LIMIT_S
        and again["process_s"] < RECOMPILE_LIMIT_S
        and ladder["process_s"] < LADDER_LIMIT_S
        and results["weights_beyond_export"] < MEMORY_LIMIT
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
