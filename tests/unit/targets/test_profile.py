"""Profiles that runtimes write, read back as layers."""

from __future__ import annotations

import types

import pytest

from enginesmith.targets import TARGETS, get_target
from enginesmith.targets._onnxruntime_profile import read_events as read_onnxruntime
from enginesmith.targets._torch_profile import CALL, MODULE
from enginesmith.targets._torch_profile import read_events as read_torch
from enginesmith.targets.base import Target
from enginesmith.targets.profile import calls_for, medians, parts_of
from enginesmith.targets.trt.profile import read_layers


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("conv1", ("conv1",)),
        ("conv1 + relu1", ("conv1", "relu1")),
        ("PWN(relu1)", ("relu1", "PWN")),
        ("{ForeignNode[/norm/a.../norm/b]}", ("/norm/a.../norm/b", "{ForeignNode}")),
        ("a\x1eb", ("a", "b")),
    ],
)
def test_names_of_fused_layers(name, parts):
    assert parts_of(name) == parts


def test_medians_are_of_the_quieter_half():
    runs = [{"a": 1.0, "b": 1.0}, {"a": 90.0, "b": 1.0}, {"a": 3.0, "b": 1.0}, {"b": 50.0, "a": 1.0}]
    assert medians(runs) == {"a": 2.0, "b": 1.0}
    assert medians([{"a": 1.0}, {"a": 1.0, "late": 4.0}, {"a": 1.0}])["late"] == 0.0
    assert medians([]) == {}


def test_slow_calls_are_profiled_less_often():
    assert calls_for(0.1) == 40
    assert calls_for(200) == 5
    assert calls_for(10_000) == 3


def node(name, ts, dur, operator="Relu", provider="CPUExecutionProvider", **args):
    return {
        "cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur,
        "args": {"op_name": operator, "provider": provider, **args},
    }  # fmt: skip


def run(ts, dur):
    return {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur, "args": {}}


def test_onnxruntime_events_of_a_call_are_summed_and_calls_compared():
    events = [
        node("a", 0, 900), run(0, 1000),  # not among the last two
        node("a", 1001, 10), node("a", 1020, 20), node("b", 1050, 5), run(1000, 100),
        node("a", 2001, 12), node("a", 2020, 20), node("b", 2050, 7), run(2000, 100),
    ]  # fmt: skip
    found = read_onnxruntime(events, {"a": ("ta",)}, 2)
    assert [(layer.name, layer.ms) for layer in found.layers] == [("a", 0.03), ("b", 0.005)]
    assert found.calls == 2
    assert found.layers[0].outputs == ("ta",)


def test_onnxruntime_nodes_that_contain_others_count_without_them():
    events = [
        node("loop", 0, 100, "Loop"), node("if", 10, 50, "If"), node("inner", 20, 30), node("after", 70, 5),
        run(0, 110),
    ]  # fmt: skip
    times = {layer.name: layer.ms for layer in read_onnxruntime(events, {}, 1).layers}
    assert times == {"loop": 0.045, "if": 0.02, "inner": 0.03, "after": 0.005}


def test_onnxruntime_tells_of_devices_copies_kernels_bytes_and_shapes():
    gpu = "CUDAExecutionProvider"
    sizes = {"activation_size": "8", "parameter_size": "4", "output_size": "2"}
    events = [
        node("copy", 0, 5, "MemcpyFromHost", gpu),
        node("conv", 10, 5, "Conv", gpu, output_type_shape=[{"float": [2, 3]}], **sizes),
        {"cat": "Kernel", "name": "implicit_gemm", "ts": 900, "dur": 40, "args": {}},
        {"cat": "Kernel", "name": "add_bias", "ts": 950, "dur": 2, "args": {}},
        node("mask", 20, 5, "Where"),
        run(0, 60),
    ]
    found = read_onnxruntime(events, {"conv": ("y",)}, 1)
    copy, conv, mask = found.layers
    assert (copy.transfer, copy.device) == (True, "cuda")
    assert (conv.ms, conv.bytes, conv.transfer) == (0.042, 14.0, False)
    assert mask.device == "cpu"
    assert found.shapes == {"y": (2, 3)}
    assert "CUPTI" in found.how


def test_tensorrt_layers_have_the_nodes_that_the_inspector_names():
    layers = [
        {"Name": "fused", "LayerType": "gemm", "Metadata": "[ONNX Layer: fc]\x1e[ONNX Layer: gelu]",
         "Outputs": [{"Name": "h"}]},
        "no JSON",
    ]  # fmt: skip
    runs = [{"fused": 0.4, "conv1 + relu1": 0.1, "Reformatting CopyNode for Input Tensor 0 to conv1": 0.02}] * 3
    found = read_layers(runs, layers)
    fused, conv, copy = found.layers
    assert (fused.operator, fused.nodes, fused.outputs, fused.ms) == ("gemm", ("fc", "gelu", "fused"), ("h",), 0.4)
    assert conv.nodes == ("conv1", "relu1")
    assert copy.operator == "Reformat"
    assert {layer.device for layer in found.layers} == {"cuda"}


class Event(types.SimpleNamespace):
    """As torch's profiler gives it."""

    def __init__(self, name, us, children=(), shapes=(), flops=0):
        super().__init__(
            name=name, cpu_time_total=us, device_time_total=10 * us, cpu_children=list(children), cpu_parent=None,
            input_shapes=[list(shape) for shape in shapes], flops=flops,
        )  # fmt: skip
        for child in children:
            child.cpu_parent = self

    def all(self):
        return [self, *(event for child in self.cpu_children for event in child.all())]


def test_torch_operators_count_with_what_they_call_and_by_module():
    def call(us):
        linear = Event("aten::linear", us, [Event("aten::addmm", us - 5, flops=64)], [(2, 4), (8, 4), ()])
        inner = Event(f"{MODULE}net.fc", us + 20, [linear])
        return Event(CALL, 1000, [Event(f"{MODULE}net", 900, [inner, Event("aten::relu", 3, shapes=[(2, 8)])])])

    outside = Event("aten::zeros", 7)
    events = [event for us in (100, 120, 110) for event in call(us).all()] + outside.all()
    linear, relu = read_torch(events, "cpu")
    assert (linear.operator, linear.module, linear.count, linear.flops) == ("aten::linear", "net.fc", 1, 64.0)
    assert linear.ms == pytest.approx(0.105)
    assert linear.bytes_read(4.0) == 4 * (8 + 32)
    assert (relu.operator, relu.module) == ("aten::relu", "net")
    assert read_torch(events, "cuda")[0].ms == pytest.approx(1.05)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_target_tells_of_its_layers(name):
    assert type(get_target(name)).profile is not Target.profile


def test_a_target_without_a_profiler_says_so(tmp_path):
    class Bare(Target):
        name = "bare"
        availability = build = runner = None

    assert Bare().profile(tmp_path, None, {}) == "bare does not tell what its layers take"
