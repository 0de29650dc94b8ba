import numpy as np
import pytest
import torch
from torch import nn

from enginesmith.compiler.capture import capture
from enginesmith.compiler.capture.strided import undo_strides
from enginesmith.compiler.graph import probe
from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import load_model

TEXT = """g (float[b,2,1,1] x) => (float[b,2,1,1] y) <int64[1] all = {-1}, int64 zero = {START}, int64 one = {STEP},
    int64 two = {STRIDE}, int64[3] axes = {1, 2, 3}, int64[1,2,1,1] columns = {0, COLUMN}, float[b,2,1,1] g1> {
    s = Shape<start=0, end=1>(x)  n = Squeeze(s)  f = Reshape(x, all)  r = Range(zero, n, one)  m = Mul(r, two)
    u = Unsqueeze(m, axes)  i = Add(u, columns)  g1 = Gather(f, i)  y = Relu(g1) }"""
IN_ORDER = {"START": 0, "STEP": 1, "STRIDE": 2, "COLUMN": 1}


def text(**changed):
    result = TEXT
    for name, number in {**IN_ORDER, **changed}.items():
        result = result.replace(name, str(number))
    return result


def test_indices_of_everything_in_order_are_left_out(read):
    graph = read(text())
    inputs = {"x": np.random.default_rng(0).standard_normal((3, 2, 1, 1)).astype(np.float32)}
    before = probe.run(graph, inputs)["y"]
    assert undo_strides(graph.model) == 1
    assert graph.operators() == {"Relu": 1}
    np.testing.assert_array_equal(probe.run(graph, inputs)["y"], before)
    assert undo_strides(graph.model) == 0


@pytest.mark.parametrize("changed", [{"START": 1}, {"STEP": 2}, {"STRIDE": 1}, {"COLUMN": 0}])
def test_other_indices_stay(read, changed):
    graph = read(text(**changed))
    assert undo_strides(graph.model) == 0
    assert graph.operators()["Gather"] == 1


class Pooled(nn.Module):
    """Channels last, pooled to one place."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        last = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return nn.functional.adaptive_avg_pool2d(last, 1).flatten(1)


@pytest.mark.parametrize("dynamic", [("x:0=1..2..8",), ()])
def test_what_torch_exports_has_no_gather(tmp_path, dynamic):
    torch.manual_seed(0)
    model = load_model(Pooled().eval(), inputs=parse_inputs(("x:2x8x4x4",), dynamic))
    captured = capture(
        model,
        exporter="dynamo",
        opset_range=(18, 20),
        samples=None,
        seed=0,
        directory=tmp_path,
        log=print,
        required=True,
    )
    assert "Gather" not in captured.graph.operators()
