"""What 2:4 sparse weights cost in accuracy, without training, by each way of choosing them.

Every method gets the same simplified fp32 graph and the same calibration batches, and is judged on the same held-out
batches by ONNX Runtime on the CPU: the relative L2 of the output, and the measure of the task.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _results import RESULTS, write
from quantization import Work
from quantization_cases import cases

from enginesmith.compiler.graph import Graph
from enginesmith.compiler.sparsity.methods import METHODS
from enginesmith.passes.base import Context
from enginesmith.passes.sparsify import Sparsify

BETTER = 2.0
"""How many times smaller than that of magnitude SparseGPT's error has to be."""


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Each method on one model."""
    work = Work.prepare(cases()[name], folder)
    expected = work.outputs(work.fp32)
    scores = work.case.metric(expected, work.data.held_out, expected)
    results: dict[str, Any] = {"fp32": scores, "methods": {}}
    print(f"{name}: fp32 {scores}")
    for method in (*reversed(METHODS), None):
        graph, path = Graph.load(work.fp32), folder / f"{method}.onnx"
        done = Sparsify(method=method).apply(graph, Context(work.signature, work.data.calibration, work.calibration))
        graph.save(path, external=False)
        found = work.outputs(path)
        error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        scores = work.case.metric(found, work.data.held_out, expected)
        results["layers"] = done.changes.get("layers made sparse", 0)
        results["methods"][method or "default"] = {"relative_l2": error, "scores": scores}
        print(f"  {method or 'default'}: relative L2 {error:.4f}, {scores}")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["digits", "minilm", "characters", "resnet50"])
    parser.add_argument("--out", type=Path, default=RESULTS / "sparsity.json")
    options = parser.parse_args()
    results = {}
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(name, Path(folder))
    write("sparsity", results, options.out)
    errors = {name: {m: one["relative_l2"] for m, one in found["methods"].items()} for name, found in results.items()}
    broken = [name for name, one in errors.items() if one["magnitude"] < BETTER * one["default"]]
    if broken:
        print(f"SparseGPT's error is not {BETTER:g} times smaller than that of magnitude: {', '.join(broken)}")
    return int(bool(broken))


if __name__ == "__main__":
    raise SystemExit(main())
