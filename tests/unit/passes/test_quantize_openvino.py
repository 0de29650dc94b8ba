"""Graphs lowered for OpenVINO, and what it executes of them."""

import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openvino")

from enginesmith.compiler.calibration import Calibration, CalibrationSettings
from enginesmith.compiler.graph.probe import run
from enginesmith.compiler.signature import TensorSpec, parse_inputs
from enginesmith.errors import RecipeError
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context
from enginesmith.targets import parse_target
from enginesmith.targets.base import BuildRequest

networks = runpy.run_path(str(Path(__file__).parents[2] / "quantized_networks.py"))
networks["PRODUCT"] = """
<ir_version: 8, opset_import: ["" : 19]>
product (float[n,256] x) => (float[n,512] y) <float[256,512] w> { y = MatMul(x, w) }
"""
INPUTS = {
    "PRODUCT": ["x:1x256"],
    "BLOCKS": ["image:1x3x32x32"],
    "RESNET": ["image:1x3x32x32"],
    "TRANSFORMER": ["x:1x32x64", "mask:1x1x1x32"],
}
OUTPUTS = {"PRODUCT": "y", "RESNET": "logits", "TRANSFORMER": "y"}


@pytest.fixture
def lowered(tmp_path):
    """What OpenVINO executes of a network in a precision, and the share of noise in its output."""

    def make(name, precision):
        signature = parse_inputs(INPUTS[name], [f"{INPUTS[name][0].partition(':')[0]}:0=1..2..4"])
        samples, graph = networks["Batches"](signature), networks["load"](networks[name])
        inputs, target = next(iter(samples)), parse_target("openvino")
        (wanted,) = run(graph, inputs).values()
        for text in target.lowering(precision):
            parse_pass(text)(graph, Context(signature, samples, Calibration(samples, CalibrationSettings())))
        output = TensorSpec(OUTPUTS[name], "float32", tuple(wanted.shape))
        request = BuildRequest(
            graph=graph,
            model=None,
            signature=dataclasses.replace(signature, outputs=(output,)),
            precision=precision,
            sample=inputs,
            directory=tmp_path,
            cache=tmp_path / "cache",
            log=lambda line: None,
        )
        info = target.build(request)
        given = target.runner(tmp_path, info).run(inputs)[OUTPUTS[name]]
        return info.details["executed"], np.square(given - wanted).sum() / np.square(wanted).sum()

    return make


def kinds(executed, kind):
    """Types that layers of a kind execute in, and how many in each."""
    return {name.split()[1]: count for name, count in executed.items() if name.split()[0] == kind}


def test_convolutions_and_their_residual_sums_are_executed_in_8_bits(lowered):
    executed, noise = lowered("RESNET", "int8")
    assert kinds(executed, "Convolution") == {"i8": 1, "u8": 5}  # the stem, whose input is about as large below zero
    assert kinds(executed, "Eltwise") == {}
    assert kinds(executed, "Pooling") == {"u8": 1}
    assert kinds(executed, "FullyConnected").keys() <= {"u8", "i8"}
    assert 1e-6 < noise < 1e-2


@pytest.mark.parametrize(("scheme", "narrow"), [("openvino", [2, 1, 1]), ("tensorrt", [1, 1, 0])])
def test_both_of_what_is_summed_and_what_is_pooled_are_in_8_bits(scheme, narrow):
    signature = parse_inputs(INPUTS["RESNET"], ["image:0=1..2..4"])
    samples, graph = networks["Batches"](signature), networks["load"](networks["RESNET"])
    context = Context(signature, samples, Calibration(samples, CalibrationSettings()))
    assert parse_pass(f"quantize-static:scheme={scheme}")(graph, context).modified
    read = [node for node in graph.nodes() if node.op_type in ("Add", "MaxPool")]
    found = [sum(value.producer().op_type == "DequantizeLinear" for value in node.inputs) for node in read]
    assert sorted(found, reverse=True) == narrow


def test_products_are_executed_in_8_bits_around_attention_in_one_kernel(lowered):
    executed, noise = lowered("TRANSFORMER", "int8")
    assert kinds(executed, "FullyConnected") == {"u8": 6}
    assert kinds(executed, "Softmax") == {}
    assert 1e-6 < noise < 1e-2


@pytest.mark.parametrize(("bits", "largest"), [(8, 1e-3), (4, 5e-2)])
def test_weights_alone_stay_in_8_and_4_bits(lowered, bits, largest):
    executed, noise = lowered("PRODUCT", f"int{bits}-weights")
    assert kinds(executed, "FullyConnected") == {f"i{bits}": 1}
    assert 1e-7 < noise < largest


@pytest.mark.parametrize(
    ("options", "message"),
    [("attention=true", "attention=true needs scheme=tensorrt"), ("dtype=fp8", "OpenVINO has no FP8 kernels")],
)
def test_what_openvino_has_no_kernels_for_is_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        parse_pass(f"quantize-static:scheme=openvino,{options}")
