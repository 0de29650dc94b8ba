import gc
import weakref

import numpy as np
import onnx
import onnx.parser
import pytest
import torch

from enginesmith.compiler.capture import capture
from enginesmith.compiler.capture.exporters import example_sizes
from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.compiler.sources.onnx_file import open_session, run_session
from enginesmith.errors import CaptureError, RecipeError

pytestmark = pytest.mark.filterwarnings("ignore")
BATCH = ["x:0=1..4..8"]
IMAGE = ["input:1x3x8x8"]


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x, state):
        return {"logits": self.linear(x), "state": (state[0] * 2, state[1])}


class Baked(torch.nn.Module):
    """Takes the size of its batch as a number."""

    def forward(self, x):
        return x.reshape(int(x.shape[0]), -1) + torch.ones(len(list(x)), 3)


class Branch(torch.nn.Module):
    def forward(self, x):
        return x * 2 if len(x) > 2 else x - 1


class Unknown(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x @ x.T).real


class Unused(torch.nn.Module):
    def forward(self, x, y):
        return x * 2


class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return x + self.count


class Once:
    """Samples of one batch."""

    description = "one batch"
    random = False

    def __init__(self, **arrays):
        self.arrays = arrays

    def __iter__(self):
        yield self.arrays


def run(tmp_path, module, inputs, dynamic=(), **options):
    model = load_model(module, inputs=parse_inputs(inputs, dynamic))
    options = {"opset_range": (9, 20), "samples": None, "seed": 0, "log": lambda line: None, **options}
    return model, capture(model, directory=tmp_path, **options)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_names_axes_and_nesting_survive(tmp_path, exporter, capfd):
    inputs, dynamic = ["x:1x3", "state.0:1x2", "state.1:5:int64"], ["x:0=1..4..8", "state.0:0=1..4..8"]
    model, captured = run(tmp_path, Net(), inputs, dynamic, exporter=exporter)
    graph = captured.graph
    assert graph.input_names == ("x", "state.0", "state.1")
    assert graph.output_names == ("logits", "state.0_out", "state.1_out")
    assert [str(v.shape[0]) for v in graph.model.graph.inputs] == ["batch", "batch", "5"]
    assert [str(v.shape[0]) for v in graph.model.graph.outputs] == ["batch", "batch", "5"]
    assert captured.record["exporter"] == exporter
    assert captured.record["opset"] == graph.opset == 20
    assert [check["sizes"] for check in captured.record["checks"]] == [{"batch": 4}, {"batch": 1}]
    assert all(check["relative_l2"] < 1e-6 for check in captured.record["checks"])
    arrays = {"x": np.ones((7, 3), "f"), "state.0": np.ones((7, 2), "f"), "state.1": np.arange(5)}
    graph.save(tmp_path / "saved.onnx")
    outputs = run_session(open_session(tmp_path / "saved.onnx"), arrays)
    np.testing.assert_allclose(outputs["logits"], model.reference.run(arrays)["logits"], rtol=1e-5)
    assert capfd.readouterr() == ("", "")


def test_a_baked_in_size_is_found(tmp_path):
    _, captured = run(tmp_path, Baked(), ["x:1x3"], BATCH)
    dynamo, torchscript = captured.record["attempts"]
    assert captured.graph is None
    assert captured.record["exporter"] is None
    assert (dynamo["succeeded"], torchscript["succeeded"]) == (False, False)
    assert "batch=1" in torchscript["reason"]
    assert dynamo["reason"]


def test_a_branch_that_the_example_did_not_take_is_found(tmp_path):
    _, captured = run(tmp_path, Branch(), ["x:1x3"], BATCH, exporter="torchscript")
    (attempt,) = captured.record["attempts"]
    assert "the graph differs from the reference at batch=1: relative L2" in attempt["reason"]


def test_the_reasons_are_kept_and_nothing_is_printed(tmp_path, capfd):
    log = []
    _, captured = run(tmp_path, Unknown(), ["x:3x3"], log=log.append)
    dynamo, torchscript = captured.record["attempts"]
    assert "No ONNX function found for" in dynamo["reason"]
    assert "aten::linalg_eigvals" in torchscript["reason"]
    assert any("dynamo failed" in line for line in log)
    assert capfd.readouterr() == ("", "")


def test_required_turns_failure_into_an_error(tmp_path):
    with pytest.raises(CaptureError, match=r"no exporter captured(?s:.*)dynamo: .*torchscript: .*eigvals"):
        run(tmp_path, Unknown(), ["x:3x3"], required=True)


def test_an_unused_input_is_kept_or_refused(tmp_path):
    inputs = ["x:1x3", "y:2"]
    assert run(tmp_path, Unused(), inputs, BATCH)[1].graph.input_names == ("x", "y")
    _, captured = run(tmp_path, Unused(), inputs, BATCH, exporter="torchscript")
    assert captured.record["attempts"][0]["reason"] == "it dropped input 'y', which the model does not use"


def test_a_stateful_model_is_no_graph(tmp_path):
    _, captured = run(tmp_path, Counting(), ["x:3"])
    assert captured.graph is None
    assert all("carries state" in attempt["reason"] for attempt in captured.record["attempts"])


def test_torchscript_goes_to_its_own_exporter_with_its_control_flow(tmp_path):
    class Flow(torch.nn.Module):
        def forward(self, x):
            if bool(x.sum() > 0):
                return x * 2
            return x - 1

    model, captured = run(tmp_path, torch.jit.script(Flow()), ["x:1x3"], BATCH)
    assert [a["exporter"] for a in captured.record["attempts"]] == ["dynamo", "torchscript"]
    assert captured.record["attempts"][0]["reason"] == "it takes no TorchScript"
    captured.graph.save(tmp_path / "saved.onnx")
    for sign in (1, -1):
        arrays = {"x": np.full((2, 3), sign, np.float32)}
        found = run_session(open_session(tmp_path / "saved.onnx"), arrays)
        np.testing.assert_array_equal(found["output"], model.reference.run(arrays)["output"])


def test_the_opset_is_what_the_targets_take(tmp_path):
    assert run(tmp_path, torch.nn.ReLU(), ["input:3"], opset_range=(9, 17))[1].graph.opset == 17
    assert run(tmp_path, torch.nn.ReLU(), ["input:3"], opset=18)[1].graph.opset == 18
    with pytest.raises(RecipeError, match=r"opset 18 is not accepted by every target(?s:.*)9 to 17"):
        run(tmp_path, torch.nn.ReLU(), ["input:3"], opset=18, opset_range=(9, 17))


def test_an_exporter_that_stays_above_the_opset_has_failed(tmp_path):
    _, captured = run(tmp_path, torch.nn.Softplus(), ["input:3"], opset_range=(9, 7), exporter="dynamo")
    assert "where the targets take 9 to 7" in captured.record["attempts"][0]["reason"]


def test_examples_are_never_of_size_one():
    signature = parse_inputs(["x:1x3", "y:1"], ["x:0=1..1..8", "y:0=one@1..1..1"])
    assert example_sizes(signature) == {"batch": 2, "one": 1}


def test_the_users_samples_are_used(tmp_path):
    class Picky(torch.nn.Module):
        def forward(self, ids):
            return torch.arange(10.0)[ids - 5]

    inputs = parse_inputs(["ids:1x3:int64"], ["ids:0=1..2..4"])
    sample = {"ids": np.array([[5, 6, 7]])}
    model = load_model(Picky(), inputs=inputs, sample=sample)
    captured = capture(
        model, opset_range=(9, 20), samples=Once(**sample), seed=0, directory=tmp_path, log=lambda line: None
    )
    assert captured.record["checks"][0] == {"sizes": {"batch": 2}, "relative_l2": 0.0}


def test_half_precision_is_compared_by_its_own_bound(tmp_path):
    _, captured = run(tmp_path, torch.nn.Linear(64, 64).half(), ["input:1x64:float16"], ["input:0=1..4..8"])
    assert captured.graph is not None


def onnx_model(path, text):
    onnx.save(onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]>' + text), path)
    return path


def test_an_onnx_source_is_a_graph_already(tmp_path):
    path = onnx_model(tmp_path / "m.onnx", "main (float[N,3] x) => (float[N,3] y) { y = Relu(x) }")
    _, captured = run(tmp_path, path, ["x:1x3"], BATCH)
    assert captured.graph.operators() == {"Relu": 1}
    assert captured.record["exporter"] == "onnx"
    assert captured.record["opset"] == 17
    assert [check["relative_l2"] for check in captured.record["checks"]] == [0, 0]


def test_an_onnx_source_with_a_baked_in_size_is_refused(tmp_path):
    text = """main (float[N,3] x) => (float[4,3] y)
        <int64[2] shape = {4,3}> { y = Reshape(x, shape) }"""
    path = onnx_model(tmp_path / "m.onnx", text)
    with pytest.raises(CaptureError, match=r"m.onnx does not run at the declared sizes(?s:.*)--dynamic"):
        run(tmp_path, path, ["x:1x3"], BATCH)


def test_the_exporter_does_not_hold_on_to_the_weights(tmp_path):
    model, captured = run(tmp_path, torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)), IMAGE)
    weight = weakref.ref(next(model.module.parameters()))
    del model
    gc.collect()
    assert weight() is None
    assert captured.path is not None
    assert captured.graph is not None
