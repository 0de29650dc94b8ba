import dataclasses

import numpy as np
import pytest
import torch

from enginesmith.compiler.benchmark.baselines import TorchCompile, TorchEager, torch_baselines
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.compiler.sources import Model
from enginesmith.errors import BuildError, TargetUnavailableError


class Double(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0]))

    def forward(self, x, index):
        return x * self.weight, index + 1


class Reference:
    resets = 0

    def run(self, inputs):
        raise AssertionError("a baseline runs the module")

    def reset(self):
        self.resets += 1


SIGNATURE = Signature(
    inputs=(TensorSpec("x", "float32", ("batch", 2)), TensorSpec("index", "int64", ("batch",))),
    outputs=(TensorSpec("double", "float32", ("batch", 2)), TensorSpec("next", "int64", ("batch",))),
    axes={"batch": AxisRange(1, 1, 4)},
)
MODEL = Model("module", Reference(), SIGNATURE, Double().eval(), None, "fingerprint", 4)
INPUTS = {"index": np.array([7, 8]), "x": np.array([[1, 2], [3, 4]], np.float32)}


def check(outputs, dtype="float32"):
    assert list(outputs) == ["double", "next"]
    np.testing.assert_array_equal(outputs["double"], 2 * INPUTS["x"])
    np.testing.assert_array_equal(outputs["next"], [8, 9])
    assert (outputs["double"].dtype, outputs["next"].dtype) == (dtype, "int64")


def test_eager_gives_outputs_by_name_called_or_bound():
    runner = TorchEager(MODEL)
    check(runner.run(INPUTS))
    bound = runner.bind(INPUTS)
    host_ms, device_ms = bound.timed(3)
    assert len(host_ms) == 3
    assert device_ms is None
    check(bound.outputs())


def test_half_precision_works_on_a_copy_and_leaves_integers_alone():
    check(TorchEager(MODEL, precision="fp16").run(INPUTS), "float16")
    assert MODEL.module.weight.dtype == torch.float32


def test_the_module_is_shared_in_fp32_on_the_cpu_and_reset_through_the_model():
    runner = TorchEager(MODEL)
    assert runner._module is MODEL.module
    before = MODEL.reference.resets
    runner.reset()
    assert MODEL.reference.resets == before + 1


def test_names_follow_precision_and_nothing_is_made_before_it_is_opened():
    broken = dataclasses.replace(MODEL, module=None)
    candidates = torch_baselines(broken, precisions=("fp32", "fp16"), compiled=True)
    assert [c.name for c in candidates] == ["torch", "torch fp16", "torch.compile", "torch.compile fp16"]
    assert [c.name for c in torch_baselines(MODEL)] == ["torch"]
    check(torch_baselines(MODEL)[0].runner().run(INPUTS))


def test_onnx_sources_have_no_torch_baseline():
    with pytest.raises(TargetUnavailableError, match="the baseline 'torch' needs a torch module"):
        TorchEager(dataclasses.replace(MODEL, kind="onnx", module=None))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(TargetUnavailableError, match="the baseline 'torch' finds no CUDA device"):
        TorchEager(MODEL, "cuda")


def test_compile_does_not_take_torchscript():
    scripted = dataclasses.replace(MODEL, module=torch.jit.script(Double()))
    with pytest.raises(TargetUnavailableError, match=r"torch\.compile does not take TorchScript"):
        TorchCompile(scripted)
    check(TorchEager(scripted).run(INPUTS))


def fake_compile(monkeypatch, wrap):
    """Replaces torch.compile, which takes too long here; how it was called is noted."""
    calls = []

    def compile_(module, **options):
        calls.append(options)
        return wrap(module)

    monkeypatch.setattr(torch, "compile", compile_)
    return calls


def test_compile_on_the_cpu_specializes_and_freezes(monkeypatch):
    calls = fake_compile(monkeypatch, lambda module: module)
    check(TorchCompile(MODEL).run(INPUTS))
    assert calls == [{"dynamic": False, "fullgraph": False, "options": {"freezing": True}}]


def test_compile_failure_says_why(monkeypatch):
    def fail(*_):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nlong trace")

    fake_compile(monkeypatch, lambda module: fail)
    with pytest.raises(BuildError, match=r"torch\.compile could not compile the model\n  found: Invalid\S+ No.*found$"):
        TorchCompile(MODEL).run(INPUTS)


def test_failure_of_a_size_that_was_compiled_is_not_called_a_compile_failure(monkeypatch):
    class Compiled:
        call = MODEL.module

        def __call__(self, *tensors):
            return self.call(*tensors)

    def lose(*_):
        raise RuntimeError("device lost")

    compiled = Compiled()
    fake_compile(monkeypatch, lambda module: compiled)
    runner = TorchCompile(MODEL)
    check(runner.run(INPUTS))
    compiled.call = lose
    with pytest.raises(RuntimeError, match=r"^device lost$"):
        runner.run(INPUTS)


@pytest.mark.slow
def test_compile_really_compiles():
    runner = TorchCompile(MODEL)
    check(runner.run(INPUTS))
    runner.close()


def test_cuda_calls_are_timed_between_events_and_waited_for(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 0.25

    class Logged(TorchEager):
        def _call(self, tensors):
            log.append("call")
            return super()._call(tensors)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("drain"))
    runner = Logged(MODEL)
    monkeypatch.setattr(runner, "_device", "cuda")
    monkeypatch.setattr(runner, "_place", lambda inputs: [torch.from_numpy(inputs[name]) for name in ("x", "index")])
    bound = runner.bind(INPUTS)
    host_ms, device_ms = bound.timed(2)
    assert log == ["drain"] + 2 * ["record", "call", "record", "wait"]
    assert len(host_ms) == 2
    assert device_ms == [0.25, 0.25]
    check(bound.outputs())
