"""One GPU beside two of one host, in rows a second: `enginesmith run --gpus`, and `serve --gpus` under load.

    run     rows of token ids from a file; opening the engines is left out, as `run` does itself
    serve   requests of one whole batch each, several clients for each GPU; the server is started anew for each round,
            and answers are checked

Rounds are interleaved, in random order; the ratio is the median of those of the rounds. Outputs of `run` on two GPUs
must be those on one, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import models
import numpy as np
from _results import write
from _served import loaded

import enginesmith
from enginesmith.offline.results import Outputs

LIMIT = 1.9
"""Times one GPU's rate that two have to reach."""

CLIENTS_A_GPU = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="0,1")
    parser.add_argument("--target", default="onnxruntime-cuda")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rows", type=int, default=131_072, help="of a run")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a load test")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=("run", "serve"), default=["run", "serve"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    every = [int(number) for number in options.gpus.split(",")]
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = compiled(options, folder)
        rate = {"run": run_rate, "serve": serve_rate}
        for way in options.ways:
            rates: dict[str, list[float]] = {"one": [], "all": []}
            order = random.Random(0)
            for _ in range(options.rounds):
                for key in order.sample(list(rates), len(rates)):
                    rates[key].append(rate[way](bundle, every if key == "all" else every[:1], options))
            results[way] = judged(rates)
            print(f"{way}: {json.dumps(results[way])}", flush=True)
        if "run" in options.ways:
            results["run"]["equal_bits"] = equal(folder / "out-1", folder / f"out-{len(every)}")
            print(f"equal bits: {results['run']['equal_bits']}")
    settings = {key: getattr(options, key) for key in ("target", "precision", "batch", "rows", "seconds")}
    write("data_parallel", {"limit": LIMIT, "gpus": len(every), **settings, "cases": results}, options.out)
    return int(any(found["ratio"] < LIMIT or not found.get("equal_bits", True) for found in results.values()))


def compiled(options: argparse.Namespace, folder: Path) -> Path:
    """The bundle of BERT-base, and a file of rows for it."""
    inputs = models.minilm_inputs(options.rows)
    np.savez(folder / "rows.npz", **inputs)
    np.savez(folder / "sample.npz", **{key: array[: options.batch] for key, array in inputs.items()})
    bundle = enginesmith.compile(
        models.bert_base(),
        folder / "bert_base",
        inputs=[f"{key}:1x{models.TOKENS}:{array.dtype}" for key, array in inputs.items()],
        dynamic=[f"{key}:0=1..{options.batch}..{options.batch}" for key in inputs],
        targets=[options.target],
        precisions=[options.precision],
        data=str(folder / "sample.npz"),
        benchmark=False,
    )
    if broken := [f"{r['name']}: {r['reason']}" for r in bundle.manifest["engines"] if r["status"] != "ready"]:
        raise SystemExit("; ".join(broken))
    return bundle.path


def run_rate(bundle: Path, gpus: list[int], options: argparse.Namespace) -> float:
    """Rows a second of `enginesmith run`."""
    out = bundle.parent / f"out-{len(gpus)}"
    data = bundle.parent / "rows.npz"
    found = enginesmith.run(bundle, data, out, gpus=gpus, batch=options.batch, shard_rows=4096, restart=True)
    return found.rows / found.seconds


def serve_rate(bundle: Path, gpus: list[int], options: argparse.Namespace) -> float:
    """Rows a second that a server on these GPUs answers."""
    load = ["--clients", str(CLIENTS_A_GPU * len(gpus)), "--batch", str(options.batch)]
    load += ["--duration", str(options.seconds), "--warmup", "2"]
    return float(loaded(bundle, ["--gpus", ",".join(map(str, gpus))], load)["achieved"]) * options.batch


def judged(rates: dict[str, list[float]]) -> dict[str, Any]:
    """The ratio of all GPUs to one."""
    return {
        "rows_per_s": rates,
        "ratio": statistics.median(many / one for one, many in zip(rates["one"], rates["all"], strict=True)),
    }


def equal(one: Path, other: Path) -> bool:
    """Whether two runs gave the same."""
    pairs = zip(Outputs.open(one), Outputs.open(other), strict=True)
    return all(np.array_equal(outputs[key], same[key]) for outputs, same in pairs for key in outputs)


if __name__ == "__main__":
    raise SystemExit(main())
