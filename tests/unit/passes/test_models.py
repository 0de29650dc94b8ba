"""The passes one after the other on graphs that torch exported."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from enginesmith.compiler.graph import Graph, probe
from enginesmith.passes import parse_pass

BATCH = torch.export.Dim("batch", min=1, max=64)


class Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        self.block = torch.nn.Sequential(
            torch.nn.Conv2d(8, 8, 3, padding=1, groups=2), torch.nn.GroupNorm(2, 8), torch.nn.SiLU()
        )
        self.head = torch.nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.max_pool2d(self.stem(x), 2)
        return self.head((x + self.block(x)).mean((2, 3))).softmax(-1)


def encoder() -> torch.nn.Module:
    return torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)


class Samples(list):
    description = "standard normal"
    random = False


@pytest.mark.parametrize(
    ("make", "shape", "dynamo"),
    [(Convolutions, (3, 16, 16), False), (encoder, (7, 32), True)],
    ids=["cnn-torchscript", "encoder-dynamo"],
)
def test_simplify_dedupe_and_cast(tmp_path, context, make, shape, dynamo):
    torch.manual_seed(0)
    model = make().eval()
    sample = torch.randn(3, *shape)
    axes = {"dynamic_shapes": ({0: BATCH},)} if dynamo else {"dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}}
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (sample,), path, input_names=["x"], output_names=["y"], dynamo=dynamo, verbose=False, **axes
    )
    graph = Graph.load(path)
    graph.infer()
    weight_bytes = graph.weight_bytes
    inputs = {"x": torch.randn(5, *shape).numpy()}
    reference = model(torch.from_numpy(inputs["x"])).detach().numpy()
    for text, tolerance in (("simplify", 1e-5), ("dedupe", 1e-5), ("cast", 5e-3)):
        graph.infer()
        result = parse_pass(text)(graph, context(graph, Samples([inputs])))
        assert not result.refusals
        found = probe.run(graph, inputs)["y"]
        assert found.dtype == np.float32
        assert np.linalg.norm(found - reference) <= tolerance * np.linalg.norm(reference)
    assert graph.model.graph.inputs[0].shape[0] == ir.SymbolicDim("batch")
    assert graph.weight_bytes < 0.6 * weight_bytes
    assert graph.precisions()["float32"] == 1
