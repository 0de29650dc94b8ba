"""A pipeline of two stages on two GPUs beside the whole engine on one, at the same micro-batch, in samples a second.

Both are of one graph, in which all is fused that the target fuses.
The whole engine runs one micro-batch after the other without waiting in between; the pipeline gets all of them as one
call. Inputs lie on the device before, outputs stay there, and the clock stops when the devices are done. Rounds are
interleaved, in random order, and the ratio is of the medians, with its bootstrap 95 % interval. Outputs are compared
micro-batch by micro-batch.

`--device cpu` shows in fp32 that all works where there are no GPUs: there the whole engine has all cores anyway, and
nothing is promised.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
from _results import write

import enginesmith
from enginesmith.compiler.trial import open_runner
from enginesmith.targets import parse_target

LIMIT = 1.6
"""Times one GPU's throughput that two have to reach."""

SAME = {"fp32": 1e-5, "fp16": 5e-3}
"""Relative L2 between the pipeline and the whole engine: kernels may sum in another order."""

CASES: dict[str, tuple[Callable[[], Any], Callable[[int], dict[str, np.ndarray]]]] = {
    "bert_base": (models.bert_base, models.minilm_inputs),
    "resnet50": (models.resnet50, models.resnet50_inputs),
}


def measured(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compiles both engines, compares what they give, and times them in turns."""
    make, inputs_of = CASES[name]
    target = "onnxruntime-cuda" if options.device == "cuda" else "onnxruntime-cpu"
    devices = f",devices={options.devices.replace(',', '+')}" if options.devices else ""
    batch = options.micro_batch * options.micro_batches
    inputs = inputs_of(batch)
    pipeline = f"pipeline:of={target},stages={options.stages},micro_batch={options.micro_batch}{devices}"
    bundle = enginesmith.compile(
        make(),
        folder / name,
        inputs=[f"{key}:{'x'.join(map(str, (1, *array.shape[1:])))}:{array.dtype}" for key, array in inputs.items()],
        dynamic=[f"{key}:0=1..{options.micro_batch}..{batch}" for key in inputs],
        targets=[target, pipeline],
        precisions=[options.precision],
        passes=["simplify", "dedupe", *parse_target(target).rewrites(options.precision)],
        benchmark=False,
        max_samples=1,
    )
    records = bundle.manifest["engines"]
    if broken := [f"{record['name']}: {record['reason']}" for record in records if record["status"] != "ready"]:
        raise SystemExit("; ".join(broken))
    whole, staged = (open_runner(bundle.path, record) for record in records)
    starts = range(0, batch, options.micro_batch)
    pieces = [{key: array[at : at + options.micro_batch] for key, array in inputs.items()} for at in starts]
    expected = [whole.run(piece) for piece in pieces]
    found = staged.run(inputs)
    errors, equal = {}, True
    for key, array in found.items():
        joined = np.concatenate([outputs[key] for outputs in expected])
        errors[key] = float(np.linalg.norm(array - joined) / np.linalg.norm(joined))
        equal = equal and bool(np.array_equal(array, joined))
    one, all_ = whole.bind(pieces[0]), staged.bind(inputs)

    def whole_s() -> float:
        start = time.perf_counter()
        for _ in pieces:
            one.run()
        one.synchronize()
        return time.perf_counter() - start

    def staged_s() -> float:
        start = time.perf_counter()
        all_.run()
        all_.synchronize()
        return time.perf_counter() - start

    ways = {"whole": whole_s, "pipeline": staged_s}
    times: dict[str, list[float]] = {way: [] for way in ways}
    order = random.Random(0)
    for number in range(options.rounds + 2):
        for way in order.sample(list(ways), len(ways)):
            seconds = ways[way]()
            if number >= 2:  # the first ones warm up
                times[way].append(seconds)
    whole.close()
    staged.close()
    cut = next(record for record in bundle.manifest["passes"] if record["text"].startswith("partition"))
    low, high = interval(times["whole"], times["pipeline"])
    return {
        "precision": options.precision,
        "micro_batch": options.micro_batch,
        "micro_batches": options.micro_batches,
        "pipeline": pipeline,
        "cut": cut["details"],
        "cuda_graphs": [stage.get("cuda_graph", {}).get("used") for stage in records[1]["details"]["stages"]],
        "relative_l2": errors,
        "equal_bits": equal,
        "seconds": times,
        "samples_per_s": {way: batch / statistics.median(found) for way, found in times.items()},
        "ratio": statistics.median(times["whole"]) / statistics.median(times["pipeline"]),
        "low": low,
        "high": high,
    }


def interval(one: list[float], other: list[float]) -> tuple[float, float]:
    """Of the ratio of medians, 95 %, by the bootstrap."""
    generator = np.random.default_rng(0)
    drawn = [np.median(generator.choice(times, (2000, len(times))), axis=1) for times in (one, other)]
    low, high = np.quantile(drawn[0] / drawn[1], (0.025, 0.975))
    return float(low), float(high)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--devices", help="of the stages, for instance cuda:0,cuda:1")
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--precision", choices=("fp32", "fp16"))
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--micro-batches", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="file of the results")
    options = parser.parse_args()
    options.precision = options.precision or ("fp16" if options.device == "cuda" else "fp32")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            found = results[name] = measured(name, options, Path(folder))
            rates = ", ".join(f"{way} {rate:.1f} samples/s" for way, rate in found["samples_per_s"].items())
            print(f"{name}: {rates}, {found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f})", flush=True)
    write("pipeline", {"device": options.device, "limit": LIMIT, "cases": results}, options.out)
    wrong = [name for name, case in results.items() if max(case["relative_l2"].values()) > SAME[case["precision"]]]
    slow = [name for name, case in results.items() if options.device == "cuda" and case["ratio"] < LIMIT]
    for name in (*wrong, *slow):
        print(f"{name} {'gives other results' if name in wrong else f'is below {LIMIT} times one GPU'}")
    return int(bool(wrong or slow))


if __name__ == "__main__":
    raise SystemExit(main())
