"""Quantized networks in TensorRT 8.6 to 11 on a GPU, in the worker that ENGINESMITH_TENSORRT_PYTHON names.

``benchmarks/tensorrt_placement.py`` times ResNet-50 and BERT-base in the placements tested here.
"""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from enginesmith.compiler.graph.probe import run
from enginesmith.compiler.signature import Signature, TensorSpec, parse_inputs
from enginesmith.compiler.sources import Model
from enginesmith.targets import parse_target
from enginesmith.targets.base import BuildRequest

pytestmark = pytest.mark.gpu

networks = runpy.run_path(str(Path(__file__).parents[1] / "quantized_networks.py"))
BATCH = 8

# Sums that 8-bit layers read without a Relu between, one after the other: TensorRT 8.6 has failed at such sums.
LINEAR_BOTTLENECKS = """
<ir_version: 8, opset_import: ["" : 17]>
bottlenecks (float[n,32,16,16] x) => (float[n,32] y)
<float[64,32,1,1] w1, float[64,1,3,3] w2, float[32,64,1,1] w3, float[64,32,1,1] w4, float[32,64,1,1] w5>
{
  a1 = Conv(x, w1)
  a2 = Relu(a1)
  a3 = Conv<group=64, pads=[1,1,1,1]>(a2, w2)
  a4 = Relu(a3)
  a5 = Conv(a4, w3)
  a = Add(a5, x)
  c1 = Conv(a, w4)
  c2 = Relu(c1)
  c3 = Conv(c2, w5)
  c = Add(c3, a)
  mean = GlobalAveragePool(c)
  y = Flatten(mean)
}
"""

BRANCHES = """
<ir_version: 8, opset_import: ["" : 17]>
branches (float[n,32,16,16] x) => (float[n,32,16,16] y)
<float[32,32,1,1] w1, float[32,32,3,3] w2, float[32,32,1,1] w3, float[32,96,1,1] w4,
 float[32,32,1,1] w6>
{
  stem0 = Conv(x, w6)
  stem = Relu(stem0)
  a0 = Conv(stem, w1)
  a = Relu(a0)
  b0 = Conv<pads=[1,1,1,1]>(stem, w2)
  b = Relu(b0)
  p = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(stem)
  c0 = Conv(p, w3)
  c = Relu(c0)
  abc = Concat<axis=1>(a, b, c)
  y = Conv(abc, w4)
}
"""

SIGNAL = """
<ir_version: 8, opset_import: ["" : 17]>
signal (float[n,32,64] x) => (float[n,32,64] y) <float[64,32,3] w1, float[32,64,3] w2>
{
  a = Conv<pads=[1,1]>(x, w1)
  b = Relu(a)
  c = Conv<pads=[1,1]>(b, w2)
  s = Add(c, x)
  y = Relu(s)
}
"""

CASES = {
    "residual": (networks["RESNET"], ["image:1x3x32x32"], ("logits", (32,))),
    "bottlenecks": (LINEAR_BOTTLENECKS, ["x:1x32x16x16"], ("y", (32,))),
    "branches": (BRANCHES, ["x:1x32x16x16"], ("y", (32, 16, 16))),
    "signal": (SIGNAL, ["x:1x32x64"], ("y", (32, 64))),
    "transformer": (networks["TRANSFORMER"], ["x:1x32x64", "mask:1x1x1x32"], ("y", (32, 64))),
}


@pytest.fixture(scope="module")
def target():
    found = parse_target("tensorrt")
    if not (availability := found.availability()).run:
        pytest.skip(availability.reason)
    return found


def build(folder, target, precision, case, **options):
    """Builds and runs an engine; the details of its build, and the error against fp32 in dB."""
    text, inputs, (name, shape) = CASES[case]
    text = text.replace('"" : 19', f'"" : {min(target.opset_range()[1], 19)}')
    dynamic = [f"{given.partition(':')[0]}:0=1..{BATCH}..{BATCH}" for given in inputs]
    signature = parse_inputs(inputs, dynamic)
    axis = signature.inputs[0].shape[0]
    signature = Signature(signature.inputs, (TensorSpec(name, "float32", (axis, *shape)),), signature.axes)
    before, graph = networks["lowered"](target, precision, text, signature, method="minmax", **options)
    sample = next(iter(networks["Batches"](signature)))
    model = Model("onnx", None, signature, None, None, "", 0)
    (folder / "cache").mkdir()
    info = target.build(BuildRequest(graph, model, signature, precision, sample, folder, folder / "cache", print))
    runner = target.runner(folder, info)
    given = runner.run(sample)[name]
    runner.close()
    wanted = run(before, sample)[name]
    noise = np.square(given - wanted).sum()
    print(json.dumps(info.details["layers"], indent=1))
    return info.details, float(10 * np.log10(np.square(wanted).sum() / noise))


def is_new(target):
    return "quantize-static:scheme=tensorrt" in target.lowering("int8")


@pytest.mark.parametrize("case", CASES)
def test_int8_is_built_and_right(tmp_path, target, case):
    details, snr = build(tmp_path, target, "int8", case)
    # Before version 10 nothing is quantized around attention.
    assert bool({"INT8", "STRONGLY_TYPED"} & set(details["flags"])) == (case != "transformer" or is_new(target))
    assert snr > 20
    assert details["layers"]["source"] == "engine"


@pytest.mark.parametrize("case", ["residual", "bottlenecks", "branches"])
def test_convolutions_are_int8_and_nothing_is_reformatted_between(tmp_path, target, case):
    details, _ = build(tmp_path, target, "int8", case)
    found = details["layers"]
    assert found["wide"] == []
    assert found["reformats"] <= 3  # of the input, before the last pooling, and of the output


def test_quantized_attention_is_built_and_right(tmp_path, target):
    _, snr = build(tmp_path, target, "int8", "transformer", attention="true")
    assert snr > 20


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("case", ["residual", "transformer"])
def test_other_precisions_of_newer_versions(tmp_path, target, case, precision):
    if reason := target.refusals().get(precision):
        pytest.skip(reason)
    _, snr = build(tmp_path, target, precision, case)
    assert snr > 20
