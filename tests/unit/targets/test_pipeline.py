"""Stages of other targets' engines: options, micro-batches, threads, build and run."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.errors import BuildError, DataError, EngineError, RecipeError
from enginesmith.passes import parse_pass
from enginesmith.targets import get_target, parse_target
from enginesmith.targets.base import BuildRequest, EngineInfo
from enginesmith.targets.pipeline import Pipeline, all_staged, staged
from enginesmith.targets.stages.flow import FlowRunner
from enginesmith.targets.stages.inner import parse_inner
from enginesmith.targets.stages.plan import Cutter, Link, Plan

NET = """g (float[N,8] x) => (float[N,8] early, float[N,8] y) <float[8,8] w, float[8,8] v>
    { a = MatMul(x, w) early = Relu(a) b = MatMul(early, v) c = MatMul(b, w) d = Add(c, a) e = MatMul(d, v)
      y = Add(e, x) }"""
SPECS = (TensorSpec("early", "float32", ("N", 8)), TensorSpec("y", "float32", ("N", 8)))


@pytest.fixture
def build(fill, context, tmp_path):
    """Builds NET on a target, after the passes that it asks for; gives the folder and what was written."""

    def make(text, name="engine"):
        target, graph = parse_target(text), fill(NET)
        signature = dataclasses.replace(context(graph).signature, outputs=SPECS)
        for rewrite in target.lowering("fp32"):
            parse_pass(rewrite)(graph, dataclasses.replace(context(graph), signature=signature))
        folder = tmp_path / name
        folder.mkdir()
        sample = {"x": np.ones((3, 8), np.float32)}
        request = BuildRequest(graph, None, signature, "fp32", sample, folder, tmp_path / "cache", lambda line: None)
        info = target.build(request)
        info.write(folder)
        return target, folder, info

    return make


def feeds(*batches):
    random = np.random.default_rng(0)
    return [{"x": random.standard_normal((batch, 8)).astype(np.float32)} for batch in batches]


@pytest.mark.parametrize("options", ["stages=2", "stages=3", "stages=3,micro_batch=2", "of=openvino,stages=2"])
def test_stages_give_what_the_whole_engine_gives(build, options):
    whole, folder, info = build("onnxruntime-cpu", "whole")
    expected = [whole.runner(folder, info).run(feed) for feed in feeds(1, 3, 8)]
    _, folder, _ = build(f"pipeline:{options}")
    runner = get_target("pipeline", EngineInfo.read(folder).options).runner(folder, EngineInfo.read(folder))
    for feed, outputs in zip(feeds(1, 3, 8), expected, strict=True):
        found = runner.run(feed)
        assert list(found) == ["early", "y"]
        for name, array in outputs.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)
    bound = runner.bind(feeds(3)[0])
    bound.run()
    bound.synchronize()
    np.testing.assert_array_equal(bound.outputs()["y"], runner.run(feeds(3)[0])["y"])
    assert [len(bound.timed(2)[0]), bound.timed(1)[1]] == [2, None]
    runner.close()


def test_the_folder_holds_an_engine_for_each_stage(build):
    _, folder, info = build("pipeline:stages=3")
    assert [(folder / "stages" / str(n) / "model.onnx").is_file() for n in range(3)] == [True] * 3
    assert [EngineInfo.read(folder / "stages" / str(n)).target for n in range(3)] == ["onnxruntime-cpu"] * 3
    assert (info.target, info.entry, info.options["stages"]) == ("pipeline", "pipeline.json", 3)
    plan = Plan.read(folder)
    assert plan.outputs == ("early", "y")
    assert [link.folder for link in plan.links] == ["stages/0", "stages/1", "stages/2"]
    assert "x" in plan.links[2].inputs  # it skips stage 1
    assert "x" in plan.needed(1)
    assert [stage["device"] for stage in info.details["stages"]] == ["cpu"] * 3


def test_stages_share_the_cores(monkeypatch):
    from enginesmith.compiler.machine import environment

    monkeypatch.setattr(environment, "cores", lambda: 12)
    assert parse_target("pipeline:stages=3").stage_target(1).threads == 4
    assert parse_target("pipeline:of=onnxruntime-cpu:threads=2,stages=3").stage_target(1).threads == 2


def test_each_gpu_stage_has_its_device():
    two = parse_target("pipeline:of=onnxruntime-cuda,stages=2")
    assert [two.stage_target(number).device_id for number in (0, 1)] == [0, 1]
    chosen = parse_target("pipeline:of=onnxruntime-cuda:tf32=true,stages=2,devices=cuda:3+cuda:1")
    assert [(t.device_id, t.tf32) for t in map(chosen.stage_target, (0, 1))] == [(3, True), (1, True)]
    assert chosen.capabilities.devices == ("cuda",)
    assert parse_target("pipeline:of=tensorrt").stage_target(1) == parse_target("tensorrt:device_id=1")
    assert parse_target("pipeline:of=tensorrt-rtx").stage_target(1) == parse_target("tensorrt-rtx")


def test_profile_has_the_layers_of_all_stages(build):
    target, folder, info = build("pipeline:stages=2")
    profile = target.profile(folder, info, feeds(3)[0])
    whole, folder, info = build("onnxruntime-cpu", "whole")
    layers = whole.profile(folder, info, feeds(3)[0]).layers
    assert len(profile.layers) >= len(layers) > 3
    assert {"Relu", "Gemm", "MatMul"} >= {layer.operator for layer in profile.layers} > {"MatMul"}


def test_lowering_ends_with_the_cut():
    assert parse_target("pipeline:of=onnxruntime-cpu:threads=1,stages=3,memory_mib=9").lowering("fp16") == (
        "cast:to=fp16",
        "partition:stages=3,on=onnxruntime-cpu:threads=1,precision=fp16,slack=0.05,memory_mib=9",
    )
    assert parse_target("pipeline").tunings("fp32")[0].alternatives[0] == {"micro_batch": 1}
    assert "bf16" in parse_target("pipeline:of=onnxruntime-cuda").refusals()
    assert "bf16" not in parse_target("pipeline:of=onnxruntime-cuda").capabilities.precisions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("stages=1", "stages of pipeline is too small"),
        ("micro_batch=0", "micro_batch of pipeline is too small"),
        ("of=torchscript", "stages cannot be engines of torchscript"),
        ("of=pipeline", "stages cannot be engines of pipeline"),
        ("stages=3,devices=cpu+cpu", "another number of devices than of stages"),
        ("devices=cuda:0+cuda:1", "stages of onnxruntime-cpu do not run on 'cuda:0'"),
        ("of=onnxruntime-cuda,devices=cpu", "stages of onnxruntime-cuda do not run on 'cpu'"),
        ("of=tensorrt-rtx,devices=cuda:0+cuda:1", "stages of tensorrt-rtx do not run on 'cuda:1'"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(RecipeError, match=message):
        parse_target(f"pipeline:{options}")


def test_a_graph_that_is_not_cut_is_refused(fill, context, tmp_path):
    graph = fill(NET)
    request = BuildRequest(graph, None, context(graph).signature, "fp32", {}, tmp_path, tmp_path, print)
    with pytest.raises(BuildError, match="the graph is not cut into 2 stages"):
        parse_target("pipeline").build(request)


def test_options_of_the_stages_target_survive_the_text():
    inner = parse_inner("onnxruntime-cpu:threads=2+disabled_optimizers=A+B+spinning=false")
    assert (inner.threads, inner.disabled_optimizers, inner.spinning) == (2, ("A", "B"), False)
    made = staged(inner, 2, "cpu", 4)
    assert parse_target(str(made)) == made
    assert parse_inner(made.of) == inner


def test_what_the_recipe_asks_for():
    cpu, torch = parse_target("onnxruntime-cpu"), parse_target("torchscript")
    assert staged(cpu, None, None, None) is cpu
    assert staged(torch, 2, None, None) is torch
    made = staged(parse_target("onnxruntime-cuda"), 2, "cuda:0, cuda:1", None)
    assert (made.name, made.devices) == ("pipeline", ("cuda:0", "cuda:1"))
    assert staged(made, 3, None, None) is made
    with pytest.raises(RecipeError, match="micro_batch is given, and no stages"):
        staged(cpu, None, None, 4)
    assert [target.name for target in all_staged((cpu, torch), 2, None, None)] == ["pipeline", "torchscript"]
    with pytest.raises(RecipeError, match="stages are cut from a graph, and no target builds from one"):
        all_staged((torch,), 2, None, None)


def test_a_stage_takes_no_more_than_its_gpu_has(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = [{"memory_bytes": 80 << 30}, {"memory_bytes": 24 << 30}, {"memory_bytes": 2 << 30}]
    monkeypatch.setattr("enginesmith.targets.pipeline.gpus", lambda: found)

    def limit(**options):
        return parse_pass(Pipeline("onnxruntime-cuda", **options).lowering("fp16")[-1]).memory_mib

    assert limit() == 24 << 10
    assert limit(devices=("cuda:0", "cuda:2")) == 2 << 10
    assert limit(memory_mib=100) == 100
    assert limit(devices=("cuda:0",)) is None  # which the stages share
    assert limit(devices=("cuda:0", "cuda:7")) is None
    assert parse_pass(Pipeline("onnxruntime-cpu").lowering("fp32")[-1]).memory_mib is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    assert limit() is None


X = TensorSpec("x", "float32", ("N", 8))


def signature(low=1, outputs=SPECS, inputs=(X,)):
    return Signature(inputs=inputs, outputs=outputs, axes={"N": AxisRange(low, max(low, 8), 64)})


@pytest.mark.parametrize(
    ("low", "rows", "batch", "expected"),
    [
        (1, 4, 12, [4, 4, 4]),
        (1, 4, 10, [4, 4, 2]),
        (1, 16, 10, [10]),
        (1, None, 16, [2] * 8),
        (1, None, 3, [1, 1, 1]),
        (3, 4, 10, [5, 5]),  # a rest of 2 is too small
        (3, 4, 11, [4, 4, 3]),
        (4, 1, 8, [4, 4]),
        (4, None, 7, [7]),
    ],
)
def test_sizes_of_micro_batches(low, rows, batch, expected):
    assert Cutter(signature(low), 2, rows).sizes(batch) == expected


def test_cut_and_join_are_inverses():
    inputs = (TensorSpec("x", "float32", ("N", 8)), TensorSpec("scale", "float32", (8,)))
    cutter = Cutter(signature(inputs=inputs), 2, 2)
    x, scale = np.arange(40, dtype=np.float32).reshape(5, 8), np.ones(8, np.float32)
    pieces = cutter.cut({"x": x, "scale": scale})
    assert [len(piece["x"]) for piece in pieces] == [2, 2, 1]
    assert all(piece["scale"] is scale for piece in pieces)
    np.testing.assert_array_equal(cutter.join(pieces[:0] + [{"x": p["x"]} for p in pieces])["x"], x)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"inputs": (TensorSpec("x", "float32", (4, 8)),)}, "no input has a dynamic batch axis"),
        ({"outputs": (TensorSpec("y", "float32", (8,)),)}, "output 'y' does not have the batch axis first"),
        ({"outputs": (TensorSpec("y", "float32", ("N", "N")),)}, "output 'y' has the batch axis twice"),
        (
            {"inputs": (TensorSpec("x", "float32", ("N", 8)), TensorSpec("z", "float32", (8, "N")))},
            "input 'z' has the batch axis elsewhere",
        ),
    ],
)
def test_calls_that_flow_whole(fields, reason):
    cutter = Cutter(signature(**fields), 2, 4)
    feed = {"x": np.zeros((4, 8), np.float32)}
    assert cutter.reason == reason
    assert cutter.cut(feed) == [feed]
    with pytest.raises(DataError, match=f"micro_batch=4 cannot be had: {reason}"):
        cutter.require()
    Cutter(signature(**fields), 2, None).require()


class Stage:
    """y = x + add; waits for `gate`, and counts the calls that are at work at a time with it."""

    def __init__(self, take, give, add, gate=None):
        self.take, self.give, self.add, self.gate = take, give, add, gate
        self.closed = False

    def run(self, inputs):
        if self.gate is not None:
            self.gate.wait(timeout=20)
        if (inputs[self.take] < 0).any():
            raise EngineError("a negative number")
        return {self.give: inputs[self.take] + self.add}

    def close(self):
        self.closed = True


def flow(first, second, rows=1):
    plan = Plan((Link("0", ("x",), ("h",)), Link("1", ("h", "x"), ("y",))), ("y",))
    specs = (TensorSpec("y", "float32", ("N", 8)),)
    return FlowRunner(plan, (first, second), Cutter(signature(outputs=specs), 2, rows))


class Meeting:
    """Two stages that pass only together: the second with micro-batch k, the first with k + 1."""

    def __init__(self, free, count):
        self.free, self.count = free, count
        self.barrier = None

    def wait(self, timeout):
        if self.free:
            self.free -= 1
        elif self.count:
            self.count -= 1
            self.barrier.wait(timeout)


def test_stages_work_at_the_same_time():
    first, second = Meeting(free=1, count=4), Meeting(free=0, count=4)
    first.barrier = second.barrier = threading.Barrier(2)
    runner = flow(Stage("x", "h", 1, first), Stage("h", "y", 1, second))
    outputs = runner.run({"x": np.zeros((5, 8), np.float32)})
    np.testing.assert_array_equal(outputs["y"], np.full((5, 8), 2, np.float32))
    assert (first.count, second.count) == (0, 0)
    runner.close()


def test_calls_from_several_threads_get_their_own_outputs():
    runner = flow(Stage("x", "h", 1), Stage("h", "y", 2), rows=2)
    feeds = [{"x": np.full((5, 8), number, np.float32)} for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for number, outputs in enumerate(pool.map(runner.run, feeds)):
            np.testing.assert_array_equal(outputs["y"], np.full((5, 8), number + 3, np.float32))
    runner.close()


def test_a_failing_micro_batch_leaves_the_others_alone():
    runner = flow(Stage("x", "h", -1), Stage("h", "y", 2), rows=2)
    with pytest.raises(EngineError, match="a negative number"):
        runner.run({"x": np.array([[1.0] * 8, [1.0] * 8, [0.5] * 8], np.float32)})
    np.testing.assert_array_equal(runner.run({"x": np.ones((1, 8), np.float32)})["y"], np.full((1, 8), 2, np.float32))
    runner.close()


def test_a_closed_pipeline_is_closed():
    stages = Stage("x", "h", 1), Stage("h", "y", 2)
    runner = flow(*stages)
    runner.close()
    runner.close()
    assert [stage.closed for stage in stages] == [True, True]
    with pytest.raises(EngineError, match="the engine is closed"):
        runner.run({"x": np.ones((1, 8), np.float32)})
