"""`enginesmith run` beside a plain loop over the same engine, the same rows and the same batches, in rows a second.

The loop reads a batch, runs it and keeps the outputs, and writes them at the end; `run` reads ahead, writes whole
shards with their hashes, and notes each. Rounds are interleaved, in random order, and a ratio is the median of those of
the rounds. Loading the engine is left out of both. With --ray the same rows go through Ray Data as well: the start of
Ray is left out, that of its actors is in it.
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

import numpy as np
from _results import write

import enginesmith
from enginesmith.offline.results import Outputs

HERE = Path(__file__).parent
LIMIT = 0.95
"""Share of the loop's rate that `run` has to reach with a heavy model."""

CASES: dict[str, dict[str, Any]] = {
    "resnet50": {
        "model": f"{HERE / 'models.py'}:resnet50",
        "inputs": ["image:1x3x224x224"],
        "dynamic": ["image:0=1..8..8"],
        "rows": 96,
        "shard_rows": 16,
        "heavy": True,
    },
    "digits": {
        "model": f"{HERE.parent / 'samples' / 'digits' / 'model.py'}:digits",
        "inputs": ["image:1x1x8x8"],
        "dynamic": ["image:0=1..64..64"],
        "rows": 98_304,
        "shard_rows": 16_384,
        "heavy": False,
    },
}


def bundle_of(name: str, case: dict[str, Any], folder: Path) -> Path:
    """The bundle of a model in fp32 for ONNX Runtime's CPU."""
    enginesmith.compile(
        case["model"],
        folder / name,
        inputs=case["inputs"],
        dynamic=case["dynamic"],
        targets=["onnxruntime-cpu"],
        precisions=["fp32"],
        benchmark=False,
    )
    return folder / name


def loop_s(engine: enginesmith.Engine, data: Path, out: Path, batch: int) -> float:
    """Seconds of what one writes by hand."""
    start = time.perf_counter()
    name = engine.signature.inputs[0].name
    rows = np.load(data, mmap_mode="r")
    found = [engine.run({name: np.ascontiguousarray(rows[i : i + batch])}) for i in range(0, len(rows), batch)]
    np.savez(out, **{key: np.concatenate([outputs[key] for outputs in found]) for key in found[0]})
    return time.perf_counter() - start


def measured(name: str, case: dict[str, Any], folder: Path, rounds: int, *, with_ray: bool) -> dict[str, Any]:
    """Rows a second of each way, round by round."""
    bundle = bundle_of(name, case, folder)
    engine = enginesmith.load(bundle)
    spec = engine.signature.inputs[0]
    shape = (case["rows"], *(int(dim) for dim in spec.shape[1:]))
    data = folder / f"{name}.npy"
    np.save(data, np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    batch = engine.signature.axes["batch"].opt

    def run_s(**options: Any) -> float:
        out = folder / f"{name}-out"
        return enginesmith.run(bundle, data, out, shard_rows=case["shard_rows"], restart=True, **options).seconds

    ways: dict[str, Callable[[], float]] = {
        "loop": lambda: loop_s(engine, data, folder / f"{name}.npz", batch),
        "run": run_s,
        "run, 2 processes": lambda: run_s(processes=2),
    }
    if with_ray:
        ways["run, Ray, 1 actor"] = lambda: run_s(ray="local")
    times: dict[str, list[float]] = {way: [] for way in ways}
    order = random.Random(0)
    for _ in range(rounds):
        for way in order.sample(list(ways), len(ways)):
            times[way].append(ways[way]())
    with np.load(folder / f"{name}.npz") as expected:
        found = Outputs.open(folder / f"{name}-out")
        assert all(np.array_equal(found[key], expected[key]) for key in expected.files)
    rates = {way: [case["rows"] / seconds for seconds in found] for way, found in times.items()}
    shares = {way: [a / b for a, b in zip(found, rates["loop"], strict=True)] for way, found in rates.items()}
    return {
        "rows": case["rows"],
        "batch": batch,
        "shard_rows": case["shard_rows"],
        "heavy": case["heavy"],
        "rows_per_s": rates,
        "of_the_loop": {way: statistics.median(found) for way, found in shares.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--ray", action="store_true", help="through Ray Data too; needs the extra [ray]")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.cases:
            case = CASES[name]
            results[name] = measured(name, case, Path(folder), arguments.rounds, with_ray=arguments.ray)
            for way, share in results[name]["of_the_loop"].items():
                rate = statistics.median(results[name]["rows_per_s"][way])
                print(f"{name}: {way} {rate:.1f} rows/s, {share:.3f} of the loop's")
    write("offline", {"limit": LIMIT, "cases": results}, arguments.out)
    return int(any(case["of_the_loop"]["run"] < LIMIT for case in results.values() if case["heavy"]))


if __name__ == "__main__":
    raise SystemExit(main())
