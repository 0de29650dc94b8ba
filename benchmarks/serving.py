"""A bundle behind `enginesmith serve`: what merging gains, how many requests it answers, what it adds to the engine.

    merging   an MLP of 100 MB, which reads its weights once a run: 64 clients, merged against not
    small     an MLP of 2 MB: requests a second from 64 clients
    overhead  the same, one client: p50 of a request against p50 of the bare engine in this process

Servers run one at a time, in turn over the rounds, on all cores; the client shares them. Full speed takes NumPy before
2, which the extra `serve` brings: pip install '.[cpu,serve]' into an environment of its own.

Exits with 1 where a promise is broken.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _results import write
from _served import loaded
from torch import nn

import enginesmith

MERGING_GAIN, SMALL_RATE, OVERHEAD_MS = 8.0, 5000.0, 1.0
CLIENTS = 64
SIZES = {"big": (1024, 4096, 4096, 1000), "small": (256, 512, 512, 10)}
WARMUP_S = 1.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundles = {name: compiled(name, Path(folder)) for name in SIZES}
        found: dict[str, list[float]] = {"merged": [], "single": [], "small": [], "served_ms": [], "engine_ms": []}
        for _ in range(options.rounds):
            for name, key, serve, clients in (
                ("big", "merged", (), CLIENTS),
                ("big", "single", ("--no-merge",), CLIENTS),
                ("small", "small", (), CLIENTS),
                ("small", "served_ms", (), 1),
            ):
                load = ("--clients", str(clients), "--duration", str(options.seconds), "--warmup", str(WARMUP_S))
                row = loaded(bundles[name], serve, load)
                p50 = row["percentiles"][0]["ms"]
                found[key].append(p50 if key == "served_ms" else row["achieved"])
            found["engine_ms"].append(bare(bundles["small"]))
            print({key: round(values[-1], 3) for key, values in found.items()}, flush=True)
    merging = statistics.median(a / b for a, b in zip(found["merged"], found["single"], strict=True))
    rate = statistics.median(found["small"])
    overhead = statistics.median(a - b for a, b in zip(found["served_ms"], found["engine_ms"], strict=True))
    goals = {
        "merging": {"found": merging, "at_least": MERGING_GAIN, "reached": merging >= MERGING_GAIN},
        "small": {"found": rate, "at_least": SMALL_RATE, "reached": rate >= SMALL_RATE},
        "overhead_ms": {"found": overhead, "below": OVERHEAD_MS, "reached": overhead < OVERHEAD_MS},
    }
    for name, goal in goals.items():
        print(f"{'reached' if goal['reached'] else 'MISSED '} {name}: {goal}")
    write("serving", {"rounds": found, "goals": goals}, options.out)
    return 0 if all(goal["reached"] for goal in goals.values()) else 1


def compiled(name: str, folder: Path) -> Path:
    """A bundle of the MLP for batches to 64."""
    sizes = SIZES[name]
    torch.manual_seed(0)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    np.savez(folder / "data.npz", input=np.random.default_rng(0).standard_normal((64, sizes[0]), np.float32))
    enginesmith.compile(
        nn.Sequential(*layers[:-1]).eval(),
        folder / name,
        inputs=[f"input:1x{sizes[0]}"],
        dynamic=["input:0=1..1..64"],
        targets=["onnxruntime-cpu:threads=1"],
        precisions=["fp32"],
        data=str(folder / "data.npz"),
        benchmark=False,
    )
    return folder / name


def bare(bundle: Path) -> float:
    """p50 in ms of the engine by itself, a row at a time."""
    with enginesmith.load(bundle) as engine, np.load(bundle / "reference" / "inputs.npz") as stored:
        row = {"input": stored["0/input"][:1]}
        times = []
        for _ in range(3000):
            start = time.perf_counter()
            engine.run(row)
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[500:])


if __name__ == "__main__":
    raise SystemExit(main())
