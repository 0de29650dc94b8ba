"""Where Q/DQ pays on TensorRT: ResNet-50 and BERT-base in fp16 and in variants of int8 and fp8, side by side.

Each variant is a target's lowering with options of quantize-static. Engines are built for one batch size, and timed on
the device in rounds that take all variants in turn. Beside the times stand what is left of float arithmetic and of
reformats, and the error against torch in fp32. With --target tensorrt-rtx it also runs where no GPU is: engines are
built and their layers told, nothing is timed. Results are merged by model into the same file.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch
from _results import RESULTS, command, write

from enginesmith.compiler.calibration import Calibration, CalibrationSettings
from enginesmith.compiler.capture import capture
from enginesmith.compiler.data import open_data
from enginesmith.compiler.graph import Graph
from enginesmith.compiler.options import split
from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import Model, load_model
from enginesmith.errors import EnginesmithError
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context
from enginesmith.targets import parse_target
from enginesmith.targets.base import BuildRequest, EngineInfo, Runner, Target

SENTENCES = ["input_ids:1x128:int64", "attention_mask:1x128:int64"]
MODELS = {
    "resnet50": (["image:1x3x224x224"], models.resnet50_inputs, ["fp16", "int8"]),
    "minilm": (SENTENCES, models.minilm_inputs, ["fp16", "int8-minmax", "int8-attention"]),
    "bert_base": (SENTENCES, models.minilm_inputs, ["fp16", "int8", "int8-feed-forward", "int8-everywhere"]),
}
"""Name: inputs, what makes them, and the variants to try by default."""

VARIANTS = {
    "fp16": ("fp16", ""),
    "int8": ("int8", ""),
    "int8-minmax": ("int8", "method=minmax"),
    "int8-attention": ("int8", "method=minmax,attention=true"),
    "int8-everywhere": ("int8", "scheme=tensorrt,method=minmax,bias_correction=false"),
    "int8-feed-forward": ("int8", "scheme=tensorrt,method=minmax,bias_correction=false,keep=*attention*"),
    "fp8": ("fp8", ""),
    "fp8-attention": ("fp8", "attention=true"),
}
"""Name: precision, and options of quantize-static in place of the target's. scheme=tensorrt quantizes around attention,
where TensorRT before 10 by itself does not.
"""

CALIBRATED = 2
ROUNDS, ITERATIONS = 15, 40


def main() -> None:
    options = parse_options()
    deadline = time.monotonic() + options.time_limit
    target = parse_target(options.target)
    results = json.loads(options.out.read_text())["results"] if options.out.exists() else {}
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(name, target, options, deadline, Path(folder))
        show(name, found)
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        results[name] = {"command": command(), "gpu": gpu, "batch": options.batch, "variants": found}
        write("tensorrt_placement", results, options.out)


def parse_options() -> argparse.Namespace:
    def several(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "tensorrt_placement.json")
    parser.add_argument("--target", default="tensorrt")
    parser.add_argument("--models", type=several, default=["resnet50", "bert_base"])
    parser.add_argument("--variants", type=several, help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--keep", default="", help="globs of nodes that stay fp16, joined by +, in every variant")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--jobs", type=int, default=1, help="engines to build at once; tactics are then timed less exactly"
    )
    parser.add_argument("--time-limit", type=float, default=540, metavar="SECONDS", help="begin no engine after this")
    return parser.parse_args()


def measure(
    name: str, target: Target, options: argparse.Namespace, deadline: float, folder: Path
) -> dict[str, dict[str, Any]]:
    inputs, make_inputs, variants = MODELS[name]
    dynamic = [f"{text.partition(':')[0]}:0={options.batch}..{options.batch}..{options.batch}" for text in inputs]
    model = load_model(f"{Path(models.__file__).resolve()}:{name}", inputs=parse_inputs(inputs, dynamic))
    arrays = make_inputs(options.batch * CALIBRATED)
    np.savez(folder / "inputs.npz", **arrays)
    data = open_data(str(folder / "inputs.npz"), model.signature, seed=0)
    low, high = target.opset_range() or (9, 20)
    captured = capture(
        model, opset_range=(low, high), samples=data, seed=0, directory=folder, log=lambda line: None, required=True
    )
    assert captured.graph is not None
    context = Context(model.signature, data, Calibration(data, CalibrationSettings()))
    for text in ("simplify", "dedupe"):
        parse_pass(text)(captured.graph, context)
    sample = {key: array[: options.batch] for key, array in arrays.items()}
    found: dict[str, dict[str, Any]] = {}
    builds: dict[str, concurrent.futures.Future[tuple[dict[str, Any], EngineInfo]]] = {}
    runners: dict[str, Runner] = {}
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for variant in options.variants or variants:
            if time.monotonic() > deadline:
                found[variant] = {"error": "left out, the time limit has passed"}
            elif reason := target.refusals().get(VARIANTS[variant][0]):
                found[variant] = {"error": reason}
            else:
                try:
                    graph, changes = lower(variant, target, options, captured.graph, context)
                except EnginesmithError as error:
                    found[variant] = {"error": str(error)}
                    continue
                found[variant] = {"changes": changes}
                builds[variant] = pool.submit(build, variant, target, graph, model, sample, folder)
    for variant, built in builds.items():
        try:
            facts, info = built.result()
        except EnginesmithError as error:
            found[variant] = {"error": str(error)}
            continue
        found[variant].update(facts)
        if target.availability().run:
            runners[variant] = target.runner(folder / variant, info)
    time_all(runners, found, sample, model.reference.run(sample))
    return found


def lower(
    variant: str, target: Target, options: argparse.Namespace, captured: Graph, context: Context
) -> tuple[Graph, dict[str, Any]]:
    """The graph of a variant, and what each pass changed."""
    precision, chosen = VARIANTS[variant]
    graph, changes = captured.clone(), {}
    for text in target.lowering(precision):
        changed = with_options(text, chosen, options.keep) if text.startswith("quantize") else text
        changes[changed] = dict(parse_pass(changed)(graph, context).changes)
    return graph, changes


def build(
    variant: str, target: Target, graph: Graph, model: Model, sample: dict[str, np.ndarray], folder: Path
) -> tuple[dict[str, Any], EngineInfo]:
    precision, _ = VARIANTS[variant]
    directory, cache, log = folder / variant, folder / "cache", list[str]()
    directory.mkdir()
    cache.mkdir(exist_ok=True)
    start = time.perf_counter()
    info = target.build(BuildRequest(graph, model, model.signature, precision, sample, directory, cache, log.append))
    seconds = round(time.perf_counter() - start, 1)
    return {"build_s": seconds, "flags": info.details["flags"], "layers": info.details["layers"]}, info


def with_options(text: str, chosen: str, keep: str) -> str:
    """A pass with further options."""
    name, own = split(text)
    _, others = split(f"{name}:{chosen}")
    kept = "+".join(filter(None, (others.get("keep"), keep)))
    merged = own | others | ({"keep": kept} if kept else {})
    return f"{name}:{','.join(f'{key}={value}' for key, value in merged.items())}"


def time_all(
    runners: dict[str, Runner], found: dict[str, dict[str, Any]], sample: dict[str, np.ndarray], wanted: dict[str, Any]
) -> None:
    times: dict[str, list[float]] = {variant: [] for variant in runners}
    bounds = {variant: runner.bind(sample) for variant, runner in runners.items()}
    for _ in range(ROUNDS):
        for variant, bound in bounds.items():
            host, device = bound.timed(ITERATIONS)
            times[variant].append(statistics.median(device or host))
    for variant, bound in bounds.items():
        found[variant]["device_ms"] = round(statistics.median(times[variant]), 4)
        found[variant]["snr_db"] = {key: round(snr(wanted[key], array), 2) for key, array in bound.outputs().items()}
        runners[variant].close()


def snr(wanted: np.ndarray, given: np.ndarray) -> float:
    """Signal to noise in dB."""
    noise = np.square(wanted.astype(np.float64) - given).sum()
    return float("inf") if noise == 0 else float(10 * np.log10(np.square(wanted.astype(np.float64)).sum() / noise))


def show(title: str, found: dict[str, dict[str, Any]]) -> None:
    print(f"\n{title}")
    for variant, facts in found.items():
        if "error" in facts:
            print(f"  {variant:16} {facts['error'].splitlines()[0]}")
            continue
        layers = facts["layers"]
        counts = f"{layers['count']} layers, {layers['narrow']} narrow, {len(layers['wide'])} wide"
        timed = f"{facts['device_ms']:8.3f} ms  {facts['snr_db']}" if "device_ms" in facts else "not timed"
        print(f"  {variant:16} {timed}  {counts}, {layers['reformats']} reformats, built in {facts['build_s']} s")


if __name__ == "__main__":
    main()
