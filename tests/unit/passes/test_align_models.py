"""Alignment of what torch's two exporters make of a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from enginesmith.compiler.graph import Graph, probe
from enginesmith.passes import parse_pass

BATCH = torch.export.Dim("batch", min=1, max=64)


class Residual(nn.Module):
    """Convolutions of odd widths around an identity, with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(8, 21, 3, padding=1), nn.BatchNorm2d(21), nn.SiLU())
        self.body = nn.Sequential(nn.Conv2d(21, 43, 3, padding=1), nn.Hardswish(), nn.Conv2d(43, 21, 1))
        self.gate = nn.Sequential(nn.Linear(21, 13), nn.ReLU(), nn.Linear(13, 21), nn.Sigmoid())
        self.head = nn.Linear(42, 101)
        nn.init.uniform_(self.stem[1].running_mean, -1, 1)
        nn.init.uniform_(self.stem[1].running_var, 0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.body(x)
        x = x + y * self.gate(y.mean((2, 3)))[:, :, None, None]
        pooled: torch.Tensor = self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))
        return pooled.softmax(-1)


class Language(nn.Module):
    """A transformer block of 5 heads of 12 with 1001 neurons, and a vocabulary of 257 that input and output share."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(257, 60)
        self.block = nn.TransformerEncoderLayer(60, 5, 1001, activation="gelu", norm_first=True, batch_first=True)
        self.norm, self.head = nn.LayerNorm(60), nn.Linear(60, 257, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(self.norm(self.block(self.words(x))))
        return made


class Recurrent(nn.Module):
    """Two layers of 13 in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(16, 13, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(26, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(self.cells(x)[0])
        return made


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def words(*shape: int) -> torch.Tensor:
    return torch.randint(0, 257, shape)


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize(
    ("make", "data", "shape", "grown"),
    [
        (Residual, noise, (8, 12, 12), {(21, 24), (43, 48), (13, 16), (101, 104)}),
        (Language, words, (7,), {(1001, 1008), (257, 264)}),
        (Recurrent, noise, (7, 16), {(13, 16)}),
    ],
    ids=["residual", "language", "recurrent"],
)
def test_torch_models(tmp_path, context, make, data, shape, grown, dynamo):
    torch.manual_seed(0)
    model = make().eval()
    path, sample = tmp_path / "model.onnx", data(3, *shape)
    axes = {"dynamic_shapes": ({0: BATCH},)} if dynamo else {"dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}}
    torch.onnx.export(
        model, (sample,), path, input_names=["x"], output_names=["y"], dynamo=dynamo, verbose=False, **axes
    )
    graph = Graph.load(path)
    graph.infer()
    parse_pass("simplify")(graph, context(graph))
    graph.infer()
    inputs = {"x": data(5, *shape).numpy()}
    before = probe.run(graph, inputs)["y"]
    result = parse_pass("align:waste=0.5")(graph, context(graph))
    after = probe.run(graph, inputs)["y"]
    assert np.linalg.norm(after - before) < 1e-5 * np.linalg.norm(before)
    assert grown <= {(row["before"], row["after"]) for row in result.details["aligned"]}
    assert graph.operators()["Pad"] == 0
    assert result.details["aligned_share"]["after"] >= result.details["aligned_share"]["before"]
    for precision in ("cast", "quantize-dynamic"):  # the numbers of both stay what they are without alignment
        lowered = graph.clone()
        assert parse_pass(precision)(lowered, context(lowered)).modified or precision != "cast"
        found = probe.run(lowered, inputs)["y"].astype(np.float32)
        assert np.linalg.norm(found - before) < 0.1 * np.linalg.norm(before)
