import builtins
import dataclasses
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

pytest.importorskip("openvino")

from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.errors import BuildError, DataError, EngineError, RecipeError, TargetUnavailableError
from enginesmith.targets import openvino as module
from enginesmith.targets import parse_target
from enginesmith.targets.base import BuildRequest, EngineInfo

MODEL = """
<ir_version: 10, opset_import: ["" : 18]>
agraph (float[N, 2] x, int64 unused) => (float[N, 2] y, float[N] total)
<float[2, 2] w = {1, 2, 3, 4}>
{
  a = MatMul(x, w)
  y = Relu(a)
  axes = Constant<value = int64[1] {1}>()
  total = ReduceSum<keepdims = 0>(y, axes)
}
"""
SIGNATURE = Signature(
    inputs=(TensorSpec("x", "float32", ("N", 2)), TensorSpec("unused", "int64", ())),
    outputs=(TensorSpec("y", "float32", ("N", 2)), TensorSpec("total", "float32", ("N",))),
    axes={"N": AxisRange(1, 2, 4)},
)
SAMPLE = {"x": np.array([[1, -1], [0, 2]], np.float32), "unused": np.array(3)}


@dataclasses.dataclass
class SavedGraph:
    """Stands for `Graph`, of which a target uses `save` only."""

    text: str

    def save(self, path: Path) -> None:
        onnx.save(onnx.parser.parse_model(self.text), path)


@pytest.fixture
def request_for(tmp_path):
    def make(text=MODEL, precision="fp32"):
        directory = tmp_path / f"openvino-{precision}"
        directory.mkdir()
        return BuildRequest(
            graph=SavedGraph(text),
            model=None,
            signature=SIGNATURE,
            precision=precision,
            sample=SAMPLE,
            directory=directory,
            cache=tmp_path / "cache",
            log=lambda line: None,
        )

    return make


@pytest.fixture
def built(request_for):
    """The target, the engine's folder, and its info as it is read back."""

    def make(target="openvino:threads=1", **options):
        asked = request_for(**options)
        parse_target(target).build(asked).write(asked.directory)
        return parse_target(target), asked.directory, EngineInfo.read(asked.directory)

    return make


def expected(x):
    y = np.maximum(x @ np.array([[1, 2], [3, 4]], np.float32), 0)
    return {"y": y, "total": y.sum(axis=1)}


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_an_engine_computes_what_the_graph_says(built, batch):
    target, directory, info = built()
    assert sorted(path.name for path in directory.iterdir()) == ["engine.json", "model.bin", "model.xml"]
    assert info.details["nodes"] == sum(info.details["executed"].values())
    runner = target.runner(directory, info)
    x = np.arange(2 * batch, dtype=np.float32).reshape(batch, 2)
    found = runner.run({"x": x, "unused": SAMPLE["unused"]})
    for name, value in expected(x).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6)
    runner.close()


def test_outputs_stay_when_the_engine_runs_again(built):
    target, directory, info = built()
    runner = target.runner(directory, info)
    first = runner.run(SAMPLE)["y"].copy()
    kept = runner.run(SAMPLE)["y"]
    runner.run({**SAMPLE, "x": SAMPLE["x"] + 1})
    np.testing.assert_array_equal(kept, first)


def test_bound_inputs_do_not_change_with_the_callers_array(built):
    target, directory, info = built()
    x = SAMPLE["x"].copy()
    bound = target.runner(directory, info).bind({**SAMPLE, "x": x})
    x[:] = 0
    host, device = bound.timed(3)
    assert (len(host), device) == (3, None)
    np.testing.assert_allclose(bound.outputs()["y"], expected(SAMPLE["x"])["y"], rtol=1e-6)


def test_calls_from_several_threads_do_not_disturb_each_other(built):
    target, directory, info = built()
    runner, wrong = target.runner(directory, info), []

    def work(number):
        x = np.full((2, 2), number, np.float32)
        right = [np.allclose(runner.run({**SAMPLE, "x": x})["y"], expected(x)["y"]) for _ in range(50)]
        wrong.extend([number] * right.count(False))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_fp32_is_not_computed_in_bfloat16(built):
    target, directory, info = built()
    x = np.full((2, 2), 1 + 2**-10, np.float32)  # bfloat16 has seven bits behind the point
    assert target.runner(directory, info).run({**SAMPLE, "x": x})["y"][0, 0] == np.float32(4 * (1 + 2**-10))


def test_the_type_of_the_rest_is_worth_a_measurement_in_8_bits(monkeypatch):
    monkeypatch.setattr(module, "has_bf16", lambda: True)
    assert parse_target("openvino").tunings("int8")[0].alternatives == ({"rest": "bf16"},)
    assert parse_target("openvino").tunings("fp32")[0].what == "threads within an operator"


def test_bf16_is_refused_where_the_processor_has_none(monkeypatch, request_for, built):
    target, directory, info = built()
    monkeypatch.setattr(module, "has_bf16", lambda: False)
    assert target.refusals()["bf16"] == "this processor has no bfloat16 instructions"
    with pytest.raises(BuildError, match="option rest=bf16 of openvino cannot be had: this processor has no bfloat16"):
        parse_target("openvino:rest=bf16").build(request_for(precision="int8"))
    with pytest.raises(EngineError, match="engine 'openvino-fp32' computes in bfloat16: this processor has no"):
        target.runner(directory, dataclasses.replace(info, precision="bf16"))


def test_what_openvino_cannot_do_says_why():
    refusals = parse_target("openvino").refusals()
    assert "bf16 is its half precision" in refusals["fp16"]
    assert "int8 has static ranges" in refusals["int8-dynamic"]
    with pytest.raises(RecipeError, match="threads of openvino is too small"):
        parse_target("openvino:threads=0")


def test_a_graph_that_openvino_does_not_know_is_a_build_error(request_for):
    text = MODEL.replace("Relu(a)", "local.Unknown(a)").replace('["" : 18]', '["" : 18, "local" : 1]')
    with pytest.raises(BuildError, match="OpenVINO refused openvino-fp32"):
        parse_target("openvino").build(request_for(text))


def test_inputs_that_do_not_fit_are_an_engine_error(built):
    target, directory, info = built()
    with pytest.raises(EngineError, match="OpenVINO failed to run the engine"):
        target.runner(directory, info).run({**SAMPLE, "x": np.zeros((2, 3), np.float32)})


def test_bound_inputs_that_do_not_fit_are_an_engine_error(built):
    target, directory, info = built()
    with pytest.raises(EngineError, match="OpenVINO refused the inputs"):
        target.runner(directory, info).bind({**SAMPLE, "x": np.zeros((2, 2))})


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1])
def test_integers_that_openvino_would_cut_off_are_refused(built, value):
    target, directory, info = built()
    runner = target.runner(directory, info)
    for call in (runner.run, runner.bind):
        with pytest.raises(DataError, match="input 'unused' holds integers that OpenVINO cuts off"):
            call({**SAMPLE, "unused": np.array(value)})
    runner.run({**SAMPLE, "unused": np.array(2**31 - 1)})


def test_a_missing_package_is_named(monkeypatch):
    def refuse(name, *args, real=builtins.__import__):
        if name == "openvino":
            raise ImportError("No module named 'openvino'")
        return real(name, *args)

    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    state = parse_target("openvino").availability()
    assert (state.build, state.run) == (False, False)
    assert "openvino cannot be imported" in state.reason
    with pytest.raises(TargetUnavailableError, match="openvino cannot be imported"):
        module._require()


def test_an_old_version_is_refused(monkeypatch):
    import openvino

    monkeypatch.setattr(openvino, "__version__", "2024.6.0-17404-x")
    with pytest.raises(TargetUnavailableError, match=r"openvino 2024\.6\.0 is too old, 2025\.0 or newer is needed"):
        module._require()


TWO = """
import signal, sys
from pathlib import Path
from enginesmith.targets import parse_target
from enginesmith.targets.base import EngineInfo
folder, target = Path(sys.argv[1]), parse_target("openvino:threads=1")
first, second = (target.runner(folder, EngineInfo.read(folder)) for _ in range(2))
first.close()
second.close()
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
signal.raise_signal(signal.SIGTERM)
"""


def test_a_signal_is_handled_after_engines_that_ended_in_another_order(built):
    _, folder, _ = built()
    done = subprocess.run([sys.executable, "-c", TWO, folder], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
