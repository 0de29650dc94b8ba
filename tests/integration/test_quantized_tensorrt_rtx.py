"""What TensorRT-RTX makes of quantized graphs, as its log tells: 8-bit throughout, and no kernel too many."""

import json
import runpy
from pathlib import Path

import pytest

from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import Model
from enginesmith.targets import parse_target
from enginesmith.targets.base import BuildRequest
from enginesmith.targets.trt.layers import data_type, multiplies

pytest.importorskip("tensorrt_rtx")

networks = runpy.run_path(str(Path(__file__).parents[1] / "quantized_networks.py"))
RESNET, TRANSFORMER = networks["RESNET"], networks["TRANSFORMER"]


def build(folder, text, inputs, precision, **options):
    """The layers of the engine and the details of its build."""
    signature = parse_inputs(inputs, [f"{inputs[0].partition(':')[0]}:0=1..2..4"])
    target = parse_target("tensorrt-rtx:compute_capabilities=8.9")
    _, graph = networks["lowered"](target, precision, text, signature, **options)
    model = Model("onnx", None, signature, None, None, "", 0)
    cache = folder / "cache"
    cache.mkdir()
    request = BuildRequest(graph, model, signature, precision, {}, folder, cache, lambda line: None)
    info = target.build(request)
    return json.loads((folder / "layers.json").read_text())["layers"], info.details["layers"]


def types(layer, place):
    return [data_type(tensor) for tensor in layer[place]]


@pytest.mark.parametrize(("precision", "narrow"), [("int8", "INT8"), ("fp8", "FP8")])
def test_residual_blocks_compute_and_pass_on_8_bits(tmp_path, precision, narrow):
    layers, found = build(tmp_path, RESNET, ["image:1x3x32x32"], precision)
    first = 0 if precision == "int8" else 1  # a stem of three channels has too few for FP8
    products = [layer for layer in layers if multiplies(layer)]
    assert found["source"] == "log of the build"
    assert (found["narrow"], len(found["wide"]), found["reformats"]) == (7 - first, first, 0)
    assert {types(layer, "Inputs")[0] for layer in products[first:]} == {narrow}
    # After each convolution stands one pointwise layer, which adds the skip branch and writes 8 bits.
    convolved = {layer["Outputs"][0]["Name"] for layer in products[first:-1]}
    readers = [layer for layer in layers if convolved & {tensor["Name"] for tensor in layer["Inputs"]}]
    assert len(readers) == len(convolved) - 1  # the projection and the last of its block share one
    assert {kind for layer in readers for kind in types(layer, "Outputs")} == {narrow}
    assert sum(narrow in types(layer, "Inputs") for layer in readers) == 1  # the identity is read in 8 bits


def test_attention_stays_one_kernel_between_8_bit_products(tmp_path):
    layers, found = build(tmp_path, TRANSFORMER, ["x:1x32x64", "mask:1x1x1x32"], "int8")
    assert found["wide"] == []
    (attention,) = (layer for layer in layers if "mha" in layer["Name"])
    assert set(types(attention, "Inputs")) == {"FP16"}
    assert types(attention, "Outputs") == ["INT8"]
    normalized = [layer for layer in layers if "Mean" in layer["Name"]]
    assert types(normalized[0], "Outputs") == ["FP16", "INT8"]  # to the sum, and to the products


@pytest.mark.parametrize(("precision", "narrow"), [("int8", "INT8"), ("fp8", "FP8")])
def test_quantized_attention_is_one_kernel_too(tmp_path, precision, narrow):
    layers, found = build(tmp_path, TRANSFORMER, ["x:1x32x64", "mask:1x1x1x32"], precision, attention="true")
    assert found["wide"] == []
    (attention,) = (layer for layer in layers if "mha" in layer["Name"])
    assert sorted(types(attention, "Inputs")) == sorted(["FP16", narrow, narrow, narrow])  # the mask, q, k and v
    assert types(attention, "Outputs") == [narrow]


def test_bf16_takes_convolutions_along(tmp_path):
    layers, _ = build(tmp_path, RESNET, ["image:1x3x32x32"], "bf16")
    assert {types(layer, "Inputs")[0] for layer in layers if layer["LayerType"] == "correlation"} == {"BF16"}
