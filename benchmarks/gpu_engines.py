"""ResNet-50, MiniLM and BERT-base on one GPU: engines against torch and torch.compile, judged against torch.

Each model is a job of its own: engines are built for a range of batch sizes, tuned for the largest, validated, and
measured in one interleaved benchmark with the baselines in fp32 and fp16. A TensorRT build takes minutes, so jobs may
be spread over several calls: results are merged by model into the same file.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch
from _results import RESULTS, command, write

import enginesmith
from enginesmith.compiler.benchmark import Candidate, Settings, SizedInputs, benchmark
from enginesmith.compiler.benchmark.baselines import torch_baselines
from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.compiler.trial import open_runner
from enginesmith.errors import EnginesmithError

SENTENCES = ["input_ids:1x128:int64", "attention_mask:1x128:int64"]
MODELS = {
    "resnet50": (["image:1x3x224x224"], models.resnet50_inputs),
    "minilm": (SENTENCES, models.minilm_inputs),
    "bert_base": (SENTENCES, models.minilm_inputs),
}
BATCHES = ("1", "8", "32")
VALIDATED_BATCHES = 2
SETTINGS = Settings(rounds=12, slice_s=0.2, warmup_s=1.0)


def main() -> None:
    options = parse_options()
    deadline = time.monotonic() + options.time_limit
    results = json.loads(options.out.read_text())["results"] if options.out.exists() else {}
    for name in options.models:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            print(f"{name}: left out, the time limit has passed")
            continue
        results[name] = run = run_job(name, options, remaining_s)
        show(name, run)
        write("gpu_engines", results, options.out)


def parse_options() -> argparse.Namespace:
    def several(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_engines.json")
    parser.add_argument("--models", type=several, default=list(MODELS))
    parser.add_argument("--batches", type=several, default=list(BATCHES))
    parser.add_argument("--targets", type=several, default=["onnxruntime-cuda", "tensorrt"])
    parser.add_argument("--precisions", type=several, default=["fp32", "fp16"])
    parser.add_argument("--eager-only", action="store_true", help="leave torch.compile out")
    parser.add_argument("--time-limit", type=float, default=540, metavar="SECONDS", help="begin no job after this")
    return parser.parse_args()


def run_job(name: str, options: argparse.Namespace, remaining_s: float) -> dict[str, Any]:
    """One model: compiled and validated by the public API, then measured at every batch size."""
    inputs, make_inputs = MODELS[name]
    batches = sorted(map(int, options.batches))
    largest = batches[-1]
    dynamic = [f"{text.partition(':')[0]}:0=1..{largest}..{largest}" for text in inputs]
    source = str(Path(models.__file__).resolve()) + f":{name}"
    arrays = make_inputs(largest * VALIDATED_BATCHES)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "inputs.npz", **arrays)
        try:
            bundle = enginesmith.compile(
                source,
                Path(folder) / "bundle",
                inputs=inputs,
                dynamic=dynamic,
                data=str(Path(folder) / "inputs.npz"),
                targets=options.targets,
                precisions=options.precisions,
                benchmark=False,
                timeout_s=max(1.0, remaining_s),
            )
        except EnginesmithError as error:
            return {"error": str(error)}
        compile_s = time.perf_counter() - start
        engines = bundle.manifest["engines"]
        model = load_model(source, inputs=parse_inputs(inputs, dynamic))
        precisions = tuple(name for name in options.precisions if name in ("fp32", "fp16"))
        candidates = torch_baselines(model, device=device(), precisions=precisions, compiled=not options.eager_only)
        candidates += [
            Candidate(engine["name"], functools.partial(open_runner, bundle.path, engine))
            for engine in engines
            if engine["status"] == "ready"
        ]
        sized = [
            SizedInputs({"batch": batch}, batch, {key: array[:batch] for key, array in arrays.items()})
            for batch in batches
        ]
        timings = benchmark(candidates, sized, baseline=candidates[0].name, protocol=SETTINGS)
    kept = ("name", "status", "reason", "build_s", "size_bytes", "cached", "details", "validation")
    return {
        "command": command(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "compile_s": compile_s,
        "engines": [{key: engine[key] for key in kept} for engine in engines],
        "capture": bundle.manifest["capture"],
        "benchmark": timings,
    }


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def show(title: str, run: dict[str, Any]) -> None:
    """A compact table of a job."""
    print(f"\n{title}")
    if "error" in run:
        print(run["error"])
        return
    columns = f"{'p50 ms':>9} {'p99 ms':>9} {'device ms':>9} {'samples/s':>10}  {'speed-up (95 %)':20} verdict"
    print(f"  {'':33} {columns}")
    judged = {engine["name"]: engine["validation"] for engine in run["engines"]}
    for timing in run["benchmark"]["timings"]:
        ratio = timing["speed_up"]
        device_ms = f"{timing['device_p50_ms']:9.3f}" if timing["device_p50_ms"] else f"{'-':>9}"
        speed = f"{ratio['ratio']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "baseline"
        print(
            f"  b{timing['batch']:<3} {timing['candidate']:28} {timing['p50_ms']:9.3f} {timing['p99_ms']:9.3f} "
            f"{device_ms} {timing['samples_per_s']:10.0f}  {speed:20} {verdict(judged.get(timing['candidate']))}"
        )
    for name, reason in run["benchmark"]["skipped"].items():
        print(f"  {name}: {reason}")
    for engine in run["engines"]:
        if engine["status"] != "ready":
            print(f"  {engine['name']}: {engine['status']}: {engine['reason']}")


def verdict(validation: dict[str, Any] | None) -> str:
    """Passed or not, with the worst relative L2 error."""
    if validation is None:
        return ""
    errors = [output["relative_l2"] for output in validation["outputs"]]
    worst = "not finite" if None in errors else f"{max(errors):.1e}"
    return f"{'passed' if validation['passed'] else 'FAILED'} (relative L2 {worst})"


if __name__ == "__main__":
    main()
