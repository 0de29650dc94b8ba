"""How far graphs in half precision are from fp32, beside torch's own half precision, on a CPU.

The graph is what `cast` makes of the captured model. It is run as `compiler.graph.emulation` says: every operator takes
rounded operands and rounds its result, which ONNX Runtime's CPU by itself would leave out. torch runs the module after
`.half()` or `.bfloat16()`, as its kernels do it. The error is the relative L2 of the output of a batch against torch in
fp32; the worst batch counts.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch
from _results import write
from torch import nn

from enginesmith.compiler.calibration import Calibration, CalibrationSettings
from enginesmith.compiler.capture import capture
from enginesmith.compiler.difference import relative_l2
from enginesmith.compiler.graph import probe
from enginesmith.compiler.graph.emulation import emulate
from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context

LIMIT = 2.0
"""How many times torch's own error in fp16 that of the graph may be."""

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
BATCHES = 8
OPSET = 22
"""The first one that has convolutions in bfloat16."""


class Batches(list[dict[str, np.ndarray]]):
    """Samples of one row each."""

    description = "the benchmark's inputs"
    random = False


def vit() -> nn.Module:
    """ViT-S/16 with seeded random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
    config.num_labels = 1000
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(models.SEED)
        return models.Logits(ViTForImageClassification(config)).eval()


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with its inputs, all rows of which have the same shape."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, np.ndarray]]
    declared: tuple[str, ...]


IMAGE = ("image:1x3x224x224",)
TOKENS = tuple(f"{name}:1x{models.TOKENS}:int64" for name in ("input_ids", "attention_mask"))
CASES = {
    "vit": Case(vit, models.resnet50_inputs, IMAGE),
    "minilm": Case(models.minilm, models.minilm_inputs, TOKENS),
    "resnet50": Case(models.resnet50, models.resnet50_inputs, IMAGE),
}


def measure(case: Case) -> dict[str, Any]:
    """Errors of the graph and of torch by precision."""
    rows = case.inputs(BATCHES)
    batches = Batches({name: array[i : i + 1] for name, array in rows.items()} for i in range(BATCHES))
    module = case.make()
    model = load_model(module, inputs=parse_inputs(case.declared))
    expected = [run_torch(module, batch) for batch in batches]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="enginesmith-") as folder:
        captured = capture(
            model,
            opset_range=(18, OPSET),
            samples=batches,
            seed=0,
            directory=Path(folder),
            log=lambda line: None,
            required=True,
        )
        assert captured.graph is not None
        calibration = Calibration(batches, CalibrationSettings())
        context = Context(model.signature, batches, calibration)
        for name in ("simplify", "dedupe", f"opset:least={OPSET}"):
            parse_pass(name)(captured.graph, context)
        for precision, dtype in DTYPES.items():
            graph = captured.graph.clone()
            result = parse_pass(f"cast:to={precision}")(graph, context)
            session = probe.Session(emulate(graph), optimized=True)
            graph_error = worst(expected, [session(batch)[0] for batch in batches])
            half = copy.deepcopy(module).to(dtype)
            torch_error = worst(expected, [run_torch(half, batch, dtype) for batch in batches])
            found[precision] = {
                "graph": graph_error,
                "torch": torch_error,
                "ratio": graph_error / torch_error,
                "nodes_lowered": result.changes["nodes lowered"],
                "nodes_kept": sum(bool(refusal.node) for refusal in result.refusals),
            }
    return found


def run_torch(module: nn.Module, batch: dict[str, np.ndarray], dtype: torch.dtype = torch.float32) -> np.ndarray:
    """The output in float32; floats go in as `dtype`."""
    tensors = [torch.from_numpy(array) for array in batch.values()]
    with torch.inference_mode():
        result: torch.Tensor = module(*(t.to(dtype) if t.is_floating_point() else t for t in tensors))
    return result.float().numpy()


def worst(expected: list[np.ndarray], found: list[np.ndarray]) -> float:
    """The largest relative L2 of any batch."""
    return max(relative_l2(f, e) for f, e in zip(found, expected, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, help="where to write the results, in place of results/half_precision.json")
    arguments = parser.parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    results: dict[str, Any] = {"limit": LIMIT, "batches": BATCHES, "opset": OPSET, "models": {}}
    for name in arguments.models:
        results["models"][name] = measure(CASES[name])
        for precision, found in results["models"][name].items():
            print(
                f"{name:<10} {precision}  graph {found['graph']:.2e}  torch {found['torch']:.2e}  "
                f"ratio {found['ratio']:.2f}  kept in fp32 {found['nodes_kept']}"
            )
    write("half_precision", results, arguments.out)
    broken = [name for name, found in results["models"].items() if not found["fp16"]["ratio"] <= LIMIT]
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
