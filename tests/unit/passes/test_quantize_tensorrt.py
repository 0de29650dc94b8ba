"""quantize-static with the placement of TensorRT."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from enginesmith.compiler.calibration import Calibration, CalibrationSettings
from enginesmith.compiler.graph.probe import run
from enginesmith.compiler.quantization.regions import REASON
from enginesmith.compiler.signature import parse_inputs
from enginesmith.errors import RecipeError
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context

networks = runpy.run_path(str(Path(__file__).parents[2] / "quantized_networks.py"))
INPUTS = {"RESNET": ["image:1x3x32x32"], "TRANSFORMER": ["x:1x32x64", "mask:1x1x1x32"]}


def quantize(name, text):
    """The graph before and after, what the pass tells, and a batch of inputs."""
    signature = parse_inputs(INPUTS[name], [f"{INPUTS[name][0].partition(':')[0]}:0=1..2..4"])
    samples = networks["Batches"](signature)
    graph = networks["load"](networks[name])
    before = graph.clone()
    context = Context(signature, samples, Calibration(samples, CalibrationSettings()))
    result = parse_pass(text)(graph, context)
    return before, graph, result, next(iter(samples))


@pytest.mark.parametrize(
    ("name", "options", "pairs"),
    [
        ("RESNET", "", 8),
        ("RESNET", ",dtype=fp8", 7),
        ("TRANSFORMER", "", 4),
        ("TRANSFORMER", ",attention=true", 8),
    ],
)
def test_results_are_close(name, options, pairs):
    before, graph, result, inputs = quantize(name, f"quantize-static:scheme=tensorrt,method=minmax{options}")
    assert result.changes["activations quantized"] == graph.operators()["QuantizeLinear"] == pairs
    assert result.changes["biases quantized"] == 0
    (wanted,), (given,) = run(before, inputs).values(), run(graph, inputs).values()
    noise = np.square(given - wanted).sum() / np.square(wanted).sum()
    assert 1e-6 < noise < 1e-2


def test_a_mean_over_all_positions_is_quantized_as_pooling(monkeypatch):
    text = networks["RESNET"].replace("float[32] b6>", "float[32] b6, int64[2] axes = {2, 3}>")
    text = text.replace("mean = GlobalAveragePool(c)\n  flat = Flatten(mean)", "flat = ReduceMean<keepdims=0>(c, axes)")
    monkeypatch.setitem(networks, "RESNET", text)
    _, graph, result, _ = quantize("RESNET", "quantize-static:scheme=tensorrt,method=minmax")
    assert (result.changes["ReduceMean to GlobalAveragePool"], result.changes["activations quantized"]) == (1, 8)
    assert "ReduceMean" not in graph.operators()


def test_older_versions_quantize_convolutions_alike_and_nothing_around_attention(monkeypatch):
    _, convolutional, _, _ = quantize("RESNET", "quantize-static:scheme=tensorrt-8,method=minmax")
    _, newer, _, _ = quantize("RESNET", "quantize-static:scheme=tensorrt,method=minmax")
    assert convolutional.fingerprint() == newer.fingerprint()
    monkeypatch.delattr(Calibration, "statistics")  # nothing is observed where nothing is quantized
    _, _, result, _ = quantize("TRANSFORMER", "quantize-static:scheme=tensorrt-8")
    assert not result.modified
    assert {refusal.reason for refusal in result.refusals} == {REASON}


@pytest.mark.parametrize("options", ["scheme=tensorrt,dtype=int8", "scheme=tensorrt,dtype=fp8,attention=true"])
def test_every_scale_has_a_zero_point_of_its_size(options):
    """TensorRT 8.6 asks for one, and zero."""
    _, graph, _, _ = quantize("TRANSFORMER", f"quantize-static:{options}")
    for node in graph.nodes():
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero_point = (value.const_value for value in node.inputs[1:])
            assert scale.shape == zero_point.shape
            assert not np.any(zero_point.numpy().astype(np.float32))


def test_attention_needs_the_scheme():
    with pytest.raises(RecipeError, match="attention=true needs scheme=tensorrt"):
        parse_pass("quantize-static:attention=true")


def test_gptq_leaves_fp8_to_nearest():
    _, graph, result, _ = quantize("RESNET", "quantize-static:scheme=tensorrt,dtype=fp8,rounding=gptq")
    _, nearest, _, _ = quantize("RESNET", "quantize-static:scheme=tensorrt,dtype=fp8")
    told = [refusal for refusal in result.refusals if refusal.reason == "rounded to nearest: it becomes FLOAT8E4M3FN"]
    assert len(told) == result.changes["weights quantized"]
    assert graph.fingerprint() == nearest.fingerprint()
