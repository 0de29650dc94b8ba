"""Time and memory of calibrating ResNet-50 on 512 images, against plain inference over the same images.

Each run is a process of its own, inference and calibration in turn, and both read the images from the same file. What
is calibrated is every activation that static quantization asks for, with histograms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import models
import numpy as np
from _results import RESULTS, write

from enginesmith.compiler.calibration import Calibration
from enginesmith.compiler.capture import capture
from enginesmith.compiler.data import open_data
from enginesmith.compiler.graph import Graph
from enginesmith.compiler.quantization.onnxruntime import plan
from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context
from enginesmith.targets._onnxruntime import Session

MODEL = f"{Path(__file__).with_name('models.py')}:resnet50"
SIGNATURE = parse_inputs(["image:1x3x224x224"], ["image:0=1..8..8"])
MEMORY_LIMIT_BYTES = 1e9
TIME_LIMIT = 1.3


def prepare(folder: Path, images: int) -> None:
    """Writes the graph and the images."""
    made = capture(
        load_model(MODEL, inputs=SIGNATURE),
        opset_range=(13, 20),
        samples=None,
        seed=0,
        directory=folder,
        log=lambda line: None,
        required=True,
    )
    assert made.graph is not None
    parse_pass("simplify")(made.graph, Context(SIGNATURE))
    made.graph.save(folder / "model.onnx")
    np.savez(folder / "images.npz", **models.resnet50_inputs(images))


def run_inference(folder: Path) -> None:
    session = Session().open(folder / "model.onnx")
    for batch in open_data(str(folder / "images.npz"), SIGNATURE):
        session.run(None, batch)


def run_calibration(folder: Path) -> None:
    graph = Graph.load(folder / "model.onnx")
    graph.infer()
    names = sorted(plan(graph).activations)
    found = Calibration(open_data(str(folder / "images.npz"), SIGNATURE)).statistics(graph, names)
    assert len(found) == len(names)


STAGES = {"inference": run_inference, "calibration": run_calibration}


def measured(stage: str, folder: Path) -> dict[str, float]:
    """Runs a stage in a process of its own: seconds, the interpreter's start left out, and its highest memory."""
    done = subprocess.run(
        [sys.executable, __file__, "--stage", stage, "--folder", folder], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_bytes() -> int:
    """The most memory that this process held; getrusage counts the one that started it too."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="of inference and calibration in turn")
    parser.add_argument("--out", type=Path, default=RESULTS / "calibration.json")
    parser.add_argument("--stage", choices=[*STAGES], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        start = time.perf_counter()
        STAGES[options.stage](options.folder)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes()}))
        return 0
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), options.images)
        rounds = [{stage: measured(stage, Path(name)) for stage in STAGES} for _ in range(options.rounds)]
    return report(options.images, rounds, options.out)


def report(images: int, rounds: list[dict[str, dict[str, float]]], out: Path) -> int:
    """Writes the medians over the rounds, and says whether the promises are kept."""
    ratio = statistics.median(r["calibration"]["seconds"] / r["inference"]["seconds"] for r in rounds)
    added = statistics.median(r["calibration"]["peak_bytes"] - r["inference"]["peak_bytes"] for r in rounds)
    results: dict[str, Any] = {
        "images": images,
        "rounds": rounds,
        "time_ratio": ratio,
        "time_limit": TIME_LIMIT,
        "bytes_beyond_inference": added,
        "bytes_limit": MEMORY_LIMIT_BYTES,
    }
    print(f"time       {ratio:.2f} x plain inference over the same images (limit {TIME_LIMIT})")
    print(f"memory     {added / 1e6:.0f} MB beyond that of plain inference (limit {MEMORY_LIMIT_BYTES / 1e6:.0f})")
    write("calibration", results, out)
    return int(ratio > TIME_LIMIT or added > MEMORY_LIMIT_BYTES)


if __name__ == "__main__":
    sys.exit(main())
