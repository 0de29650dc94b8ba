"""The end of a GPU's memory: the batch that does not fit is a result, and the memory is free again afterwards."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
import torch

from enginesmith.compiler.batch.search import search_batches
from enginesmith.compiler.benchmark.gpu_monitor import GpuMonitor
from enginesmith.compiler.recipe import Recipe
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.targets.base import EngineInfo

pytestmark = pytest.mark.gpu

WIDTH = 1 << 24
"""Values of an intermediate result a sample: 64 MiB."""

GRAPH = """
<ir_version: 10, opset_import: ["" : 18]>
agraph (float[batch, 1] x, float[1] scale) => (float[batch, 1] y) <int64[2] wide = {1, WIDTH}, int64[1] last = {1}>
{
  a = Expand(x, wide)
  b = Mul(a, scale)
  y = ReduceMean<keepdims = 1>(b, last)
}
"""

SIGNATURE = Signature(
    inputs=(TensorSpec("x", "float32", ("batch", 1)), TensorSpec("scale", "float32", (1,))),
    outputs=(TensorSpec("y", "float32", ("batch", 1)),),
    axes={"batch": AxisRange(1, 4, 1_000_000)},
)
SAMPLE = {"x": np.ones((2, 1), np.float32), "scale": np.ones(1, np.float32)}


class Hungry(torch.nn.Module):
    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor]:
        return ((x.expand(-1, 16777216) * scale).mean(1, keepdim=True),)


def write_graph(folder: Path) -> EngineInfo:
    onnx.save(onnx.parser.parse_model(GRAPH.replace("WIDTH", str(WIDTH))), folder / "model.onnx")
    return EngineInfo("engine", "onnxruntime-cuda", "fp32", "model.onnx", SIGNATURE)


def write_script(folder: Path) -> EngineInfo:
    torch.jit.script(Hungry().eval()).save(str(folder / "model.pt"))
    return EngineInfo("engine", "torchscript", "fp32", "model.pt", SIGNATURE, options={"device": "cuda"})


def used_bytes() -> int:
    with GpuMonitor() as gpu:
        return gpu.memory_bytes() or 0


@pytest.mark.parametrize("write", [write_graph, write_script])
def test_the_end_of_the_gpus_memory_is_found_and_all_of_it_given_back(tmp_path, write):
    folder = tmp_path / "engines" / "engine"
    folder.mkdir(parents=True)
    write(folder).write(folder)
    before = used_bytes()
    (curve,) = search_batches(
        tmp_path,
        [{"name": "engine", "status": "ready"}],
        SAMPLE,
        SIGNATURE,
        Recipe(rounds=6, slice_s=0.02, p99="100ms"),
        lambda fraction, what: None,
    )
    deadline = time.monotonic() + 10  # the driver frees what a killed process had a moment later
    while used_bytes() > before + (64 << 20) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert used_bytes() <= before + (64 << 20)

    sample_bytes, total = 4 * WIDTH, torch.cuda.get_device_properties(0).total_memory
    assert curve["device"] == "cuda"
    assert curve["largest_is_limit"] is False
    assert total / sample_bytes / 4 < curve["largest"] < total / sample_bytes
    by_batch = {point["batch"]: point for point in curve["points"]}
    beyond = [point for point in by_batch.values() if not point["fits"]]
    assert beyond
    assert all(point["reason"].startswith("out of memory") for point in beyond), beyond
    assert by_batch[curve["largest"]]["memory_bytes"] > curve["largest"] * sample_bytes
    assert curve["best"] is not None
    assert by_batch[curve["best"]]["p99_ms"] <= 100
