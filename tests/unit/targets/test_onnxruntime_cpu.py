import builtins
import dataclasses
import sys
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.errors import (
    BuildError,
    DataError,
    EngineError,
    EngineMismatchError,
    RecipeError,
    TargetUnavailableError,
)
from enginesmith.targets import onnxruntime_cpu, parse_target
from enginesmith.targets.base import BuildRequest, EngineInfo
from enginesmith.targets.onnxruntime_cpu import OnnxRuntimeCpu

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


def request(tmp_path: Path, text: str = MODEL, precision: str = "fp32", sample=SAMPLE) -> BuildRequest:
    directory = tmp_path / f"onnxruntime-cpu-{precision}"
    directory.mkdir(parents=True)
    return BuildRequest(
        graph=SavedGraph(text),
        model=None,
        signature=SIGNATURE,
        precision=precision,
        sample=sample,
        directory=directory,
        cache=tmp_path / "cache",
        log=lambda line: None,
    )


@pytest.fixture
def built(tmp_path):
    asked = request(tmp_path)
    target = parse_target("onnxruntime-cpu:threads=1")
    info = target.build(asked)
    info.write(asked.directory)
    return target, asked.directory, info


def expected(x):
    y = np.maximum(x @ np.array([[1, 2], [3, 4]], np.float32), 0)
    return {"y": y, "total": y.sum(axis=1)}


def test_build_writes_the_graph_and_what_became_of_it(built):
    _, directory, info = built
    assert sorted(p.name for p in directory.iterdir()) == ["engine.json", "model.onnx"]
    assert EngineInfo.read(directory).details == info.details
    assert info.name == "onnxruntime-cpu-fp32"
    assert info.options["threads"] == 1
    assert info.details["operators"] == {"MatMul": 1, "Relu": 1, "ReduceSum": 1}
    assert info.details["placement"] == {"CPUExecutionProvider": 3}
    assert (info.details["nodes"], info.details["casts"], info.details["memcpy"]) == (3, 0, 0)


def test_build_counts_casts_and_nodes_in_branches(tmp_path):
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    agraph (float16[N, 2] x, bool flag) => (float16[N, 2] y)
    {
      y = If (flag) <
        then_branch = g1 () => (float16[N, 2] y1) { y1 = Tanh(x) },
        else_branch = g2 () => (float16[N, 2] y2) { y2 = Neg(x) }>
    }
    """
    sample = {"x": np.ones((2, 2), np.float16), "flag": np.array(True)}
    details = parse_target("onnxruntime-cpu").build(request(tmp_path, text, "fp16", sample)).details
    assert {"If", "Tanh", "Neg", "Cast"} <= set(details["operators"])
    assert details["casts"] == details["operators"]["Cast"] == 4
    assert sum(details["operators"].values()) == details["nodes"]


def test_build_names_quantized_nodes_that_compute_floats(tmp_path):
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    agraph (float[2, 2] x) => (float[2, 2] y)
    <float scale = {0.1}, uint8 zero = {0}>
    {
      integers = QuantizeLinear(x, scale, zero)
      floats = DequantizeLinear(integers, scale, zero)
      made = Erf(floats)
      again = QuantizeLinear(made, scale, zero)
      y = DequantizeLinear(again, scale, zero)
    }
    """
    details = parse_target("onnxruntime-cpu").build(request(tmp_path, text)).details
    assert list(details["unfused"].values()) == ["computes floats between integer nodes"]


def test_build_leaves_nothing_in_the_cache(tmp_path):
    parse_target("onnxruntime-cpu").build(request(tmp_path))
    assert list((tmp_path / "cache").iterdir()) == []


def test_build_refuses_what_onnxruntime_refuses(tmp_path):
    text = MODEL.replace("Relu", "NoSuchOperator")
    with pytest.raises(BuildError, match=r"ONNX Runtime refused model\.onnx.*NoSuchOperator"):
        parse_target("onnxruntime-cpu").build(request(tmp_path, text))


def test_build_runs_the_sample(tmp_path):
    bad = {"x": np.ones((2, 3), np.float32)}
    with pytest.raises(BuildError, match=r"failed to run model\.onnx on the sample"):
        parse_target("onnxruntime-cpu").build(request(tmp_path, MODEL.replace(", int64 unused", ""), sample=bad))


def test_run_gives_the_outputs_by_name(built):
    target, directory, info = built
    outputs = target.runner(directory, info).run(SAMPLE)
    assert list(outputs) == ["y", "total"]
    for name, value in expected(SAMPLE["x"]).items():
        np.testing.assert_allclose(outputs[name], value)


def test_run_takes_scalars_and_strided_arrays(built):
    target, directory, info = built
    x = np.array([[1, -1], [0, 2]], np.float32).T
    outputs = target.runner(directory, info).run({"x": x, "unused": np.int64(3)})
    np.testing.assert_allclose(outputs["y"], expected(x)["y"])


def test_run_takes_dlpack_tensors(built):
    torch = pytest.importorskip("torch")
    target, directory, info = built
    runner = target.runner(directory, info)
    outputs = runner.run({"x": torch.from_numpy(SAMPLE["x"]), "unused": torch.tensor(3)})
    np.testing.assert_allclose(torch.from_dlpack(outputs["y"]), expected(SAMPLE["x"])["y"])
    with pytest.raises(DataError, match=r"input 'x' cannot be read on the CPU: .*gradient"):
        runner.run({"x": torch.ones(2, 2, requires_grad=True), "unused": torch.tensor(3)})


def test_run_refuses_what_is_no_array(built):
    target, directory, info = built
    with pytest.raises(DataError, match="expected: a NumPy array or a DLPack tensor"):
        target.runner(directory, info).run({**SAMPLE, "x": [[1.0, 2.0]]})


def test_run_failure_is_an_engine_error(built):
    target, directory, info = built
    with pytest.raises(EngineError, match=r"ONNX Runtime failed to run the engine: .*invalid dimensions"):
        target.runner(directory, info).run({**SAMPLE, "x": np.ones((1, 3), np.float32)})


def test_bind_runs_and_times(built):
    target, directory, info = built
    bound = target.runner(directory, info).bind(SAMPLE)
    host, device = bound.timed(3)
    bound.synchronize()
    assert len(host) == 3
    assert min(host) > 0
    assert device is None
    np.testing.assert_allclose(bound.outputs()["total"], expected(SAMPLE["x"])["total"])


def test_options_reach_the_session(tmp_path):
    text = "onnxruntime-cpu:threads=2,inter_threads=3,spinning=false,optimization=none"
    target = parse_target(text)
    assert str(target) == text
    asked = request(tmp_path)
    info = target.build(asked)
    options = target.runner(asked.directory, info)._session.get_session_options()
    assert options.intra_op_num_threads == 2
    assert options.inter_op_num_threads == 3
    assert options.execution_mode.name == "ORT_PARALLEL"
    assert options.graph_optimization_level.name == "ORT_DISABLE_ALL"
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_disabled_optimizers_reach_the_session(tmp_path):
    text = MODEL.replace("y = Relu(a)", "b = Relu(a) y = Identity(b)")
    kept = parse_target("onnxruntime-cpu:disabled_optimizers=EliminateIdentity").build(request(tmp_path, text))
    assert kept.details["operators"]["Identity"] == 1


def test_memory_of_a_run_is_kept_or_not(tmp_path):
    for number, kept in enumerate((True, False)):
        target = parse_target(f"onnxruntime-cpu:arena={kept}")
        asked = request(tmp_path / str(number))
        options = target.runner(asked.directory, target.build(asked))._session.get_session_options()
        assert (options.enable_cpu_mem_arena, options.enable_mem_pattern) == (kept, kept)


class TestOptimizedModel:
    TEXT = "onnxruntime-cpu:optimized_model=true"

    def test_it_takes_the_place_of_the_graph(self, tmp_path):
        asked = request(
            tmp_path, MODEL.replace("a = MatMul(x, w)", "zero = Sub(w, w)  v = Add(w, zero)  a = MatMul(x, v)")
        )
        target = parse_target(self.TEXT)
        info = target.build(asked)
        assert info.entry == "optimized.onnx"
        assert "model.onnx" not in {file.name for file in asked.directory.iterdir()}
        nodes = onnx.load(asked.directory / "optimized.onnx", load_external_data=False).graph.node
        assert [node.op_type for node in nodes] == ["MatMul", "Relu", "ReduceSum"]
        runner = target.runner(asked.directory, info)
        assert runner._session.get_session_options().graph_optimization_level.name == "ORT_DISABLE_ALL"
        for name, value in expected(SAMPLE["x"]).items():
            np.testing.assert_allclose(runner.run(SAMPLE)[name], value)

    def test_it_runs_on_processors_alike_only(self, tmp_path, monkeypatch):
        target, asked = parse_target(self.TEXT), request(tmp_path)
        info = target.build(asked)
        assert {"onnxruntime", "machine"} <= set(info.requires)
        monkeypatch.setattr("platform.machine", lambda: "pdp11")
        with pytest.raises(EngineMismatchError, match=r"was built for another machine"):
            target.runner(asked.directory, info)

    def test_it_has_to_compute_the_same(self, tmp_path, monkeypatch):
        monkeypatch.setattr(onnxruntime_cpu, "relative_l2", lambda found, expected: 0.5)
        with pytest.raises(BuildError, match="the graph that ONNX Runtime saves computes another 'y'"):
            parse_target(self.TEXT).build(request(tmp_path))

    def test_without_optimization_there_is_nothing_to_save(self):
        with pytest.raises(RecipeError, match="optimized_model=true saves a graph that optimization=none leaves"):
            parse_target(self.TEXT + ",optimization=none")


@pytest.mark.parametrize(
    ("cores", "processors", "threads", "counts"),
    [(1, 1, None, []), (2, 2, None, [1]), (8, 16, None, [16, 4, 1]), (8, 16, 4, [16, 8, 1])],
)
def test_threads_to_try_are_those_of_the_machine(monkeypatch, cores, processors, threads, counts):
    monkeypatch.setattr("enginesmith.compiler.machine.environment.cores", lambda: cores)
    monkeypatch.setattr("enginesmith.compiler.machine.environment.processors", lambda: processors)
    tunings = OnnxRuntimeCpu(threads=threads).tunings("fp32")
    tried = [dict(found) for tuning in tunings for found in tuning.alternatives]
    assert [found["threads"] for found in tried if "threads" in found] == counts
    assert ({"inter_threads": 2} in tried) == (cores > 1)


@pytest.mark.parametrize("option", ["threads", "inter_threads"])
def test_thread_counts_below_one_are_refused(option):
    with pytest.raises(RecipeError, match=f"{option} of onnxruntime-cpu is too small"):
        OnnxRuntimeCpu(**{option: 0})


def test_missing_package_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    found = parse_target("onnxruntime-cpu").availability()
    assert not found.build
    assert not found.run
    assert "onnxruntime cannot be imported" in found.reason
    assert found.install == "pip install 'enginesmith[cpu]'"
    with pytest.raises(TargetUnavailableError, match=r"pip install 'enginesmith\[cpu\]'"):
        parse_target("onnxruntime-cpu").runner(Path("."), None)


def test_old_package_is_refused(monkeypatch):
    monkeypatch.setattr("onnxruntime.__version__", "1.22.1")
    found = parse_target("onnxruntime-cpu").availability()
    assert found.reason == "onnxruntime 1.22.1 is too old, 1.23 or newer is needed"
    assert "--upgrade" in found.install
