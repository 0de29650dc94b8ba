"""The ladder from the command line, with real engines; only the stopwatch is made up where a test needs to know it."""

import collections
import json
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from enginesmith.compiler.engine import ranked
from enginesmith.compiler.ladder import trials
from enginesmith.compiler.ladder.clock import Clock
from enginesmith.compiler.recipe import Recipe
from enginesmith.targets import onnxruntime_cpu
from enginesmith.targets.base import Tuning

FP32 = "onnxruntime-cpu-fp32"


@pytest.fixture
def arguments(tmp_path):
    """A compile of a network of two layers, as an ONNX file, which takes no export."""
    random = np.random.default_rng(0)
    width = 1001  # so that there is something to align
    shapes = {"w": (4, width), "b": (width,), "v": (width, 3), "c": (3,)}
    arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    graph = onnx.parser.parse_graph(
        "net (float[N, 4] x) => (float[N, 3] y) { h = Gemm(x, w, b) r = Relu(h) y = Gemm(r, v, c) }"
    )
    graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", x=random.standard_normal((16, 4)).astype(np.float32))
    return [
        "compile", str(tmp_path / "net.onnx"), "--dynamic", "x:0=1..4..8", "--data", str(tmp_path / "data.npz"),
        "--target", "onnxruntime-cpu", "-o", str(tmp_path / "out"),
    ]  # fmt: skip


@pytest.fixture
def compile(enginesmith, arguments):
    """Compiles the small model with the ladder; gives its record, the rest of the manifest beside."""

    def run(*more, code=0):
        outcome = enginesmith(
            *arguments, "--benchmark", "--baseline", "none", "--rounds", "6", "--slice-s", "0.01", *more
        )
        assert outcome.code == code, outcome
        manifest = json.loads((Path(arguments[-1]) / "manifest.json").read_text())
        return manifest["ladder"], manifest

    return run


@pytest.fixture
def speeds(monkeypatch):
    """Sets how fast engines are by what their name ends with; one that is not named is as fast as the incumbent.

    The target has no rewrites and options of its own, where a test does not give it some.
    """
    monkeypatch.setattr(onnxruntime_cpu.OnnxRuntimeCpu, "rewrites", lambda self, precision: ())
    monkeypatch.setattr(onnxruntime_cpu.OnnxRuntimeCpu, "tunings", lambda self, precision: ())
    given = {}
    asked = []

    def race(folder, engines, sample, signature, recipe, sizes, update):
        asked.append(sizes)
        rate = {e["name"]: next((v for k, v in given.items() if e["name"].endswith(k)), 1.0) for e in engines}
        first = engines[0]["name"]
        timings = {}
        for name, value in rate.items():
            ratio = value / rate[first]
            timings[name] = {
                "p50_ms": 1 / value,
                "samples_per_s": value,
                "speed_up": None
                if name == first
                else {"against": first, "ratio": ratio, "low": ratio * 0.99, "high": ratio * 1.01},
            }
        return timings, {}

    monkeypatch.setattr(trials, "race", race)
    monkeypatch.setattr(Recipe, "explains", False)
    given["sizes"] = asked
    return given


def status(ladder):
    return {
        (step["step"], step["candidate"].removeprefix("onnxruntime-cpu")): step["status"] for step in ladder["steps"]
    }


def test_the_fastest_that_is_right_is_kept_and_all_others_are_removed(compile, speeds, arguments):
    speeds.update({"-int8": 2.0, "-fp16": 0.5})
    ladder, manifest = compile()
    assert status(ladder) == {
        ("captured graph", "-captured"): "start",
        ("simplify", "-fp32"): "kept",
        ("precision", "-fp16"): "reverted",
        ("quantization", "-int8"): "kept",
        ("quantization", "-int8-dynamic"): "skipped",
    }
    reasons = {step["candidate"]: step["reason"] for step in ladder["steps"]}
    assert reasons["onnxruntime-cpu-int8"] == f"2.00 times the speed of {FP32}, 95 % interval 1.98 to 2.02"
    assert reasons["onnxruntime-cpu-fp16"].endswith("95 % interval 0.49 to 0.51, which has to lie above 1.02")
    assert ladder["picks"] == {"onnxruntime-cpu": "onnxruntime-cpu-int8"}
    assert ladder["complete"]
    names = [engine["name"] for engine in manifest["engines"]]
    assert names == [FP32, "onnxruntime-cpu-int8"]
    assert sorted(path.name for path in (Path(arguments[-1]) / "engines").iterdir()) == names
    assert [r["text"] for r in manifest["passes"] if r["engines"] == ["onnxruntime-cpu-int8"]] == ["quantize-static"]
    script = (Path(arguments[-1]) / "engines" / "onnxruntime-cpu-int8" / "reproduce.sh").read_text()
    assert "--precision int8 --pass simplify --pass dedupe --output" in script


def test_a_precision_that_is_not_close_enough_is_reverted_and_mixed_is_tried(compile, speeds):
    speeds.update({"-int8": 9.0})
    ladder, _ = compile("--tolerance", "int8.relative_l2=1e-9")
    (step,) = (step for step in ladder["steps"] if step["candidate"] == "onnxruntime-cpu-int8")
    assert step["status"] == "reverted"
    assert step["reason"].startswith("not close enough: output")
    assert step["relative_l2"] > 1e-9
    assert ("mixed precision", "-mixed") in status(ladder)
    assert ladder["picks"]["onnxruntime-cpu"] != "onnxruntime-cpu-int8"


def test_the_size_counts_where_it_is_the_objective(compile, speeds):
    speeds.update({"": 1.0, "-int8": 0.1})
    ladder, manifest = compile("--objective", "size=0.3", "--effort", "quick")
    pick = ladder["picks"]["onnxruntime-cpu"]
    size = {engine["name"]: engine["size_bytes"] for engine in manifest["engines"]}
    assert pick != FP32
    assert size[pick] <= 0.7 * size[FP32]
    assert "of the size of" in next(step["reason"] for step in ladder["steps"] if step["candidate"] == pick)
    assert manifest["verdict"]["best"] == ranked(manifest)[0]["name"] == pick


def test_what_a_step_costs_counts_its_race(compile, speeds, monkeypatch):
    race, note = trials.race, Clock.note
    noted = collections.Counter()

    def slow(*given):
        time.sleep(0.5)
        return race(*given)

    def counted(clock, kind, seconds):
        noted[kind] += seconds
        note(clock, kind, seconds)

    monkeypatch.setattr(trials, "race", slow)
    monkeypatch.setattr(Clock, "note", counted)
    ladder, _ = compile("--effort", "quick")
    raced = {step["step"] for step in ladder["steps"] if step["ratio"] and step["step"] in noted}
    assert raced
    assert all(noted[kind] > 0.5 for kind in raced)


def test_throughput_is_raced_at_the_largest_batch(compile, speeds):
    compile("--objective", "throughput", "--effort", "quick")
    assert {next(iter(sizes.values())) for sizes in speeds["sizes"]} == {8}


def test_options_of_the_target_are_tried_one_question_after_the_other(compile, speeds, monkeypatch):
    questions = (
        Tuning("threads", ({"threads": 1}, {"threads": 2}), "quick"),
        Tuning("branches", ({"inter_threads": 2},), "quick"),
    )
    monkeypatch.setattr(onnxruntime_cpu.OnnxRuntimeCpu, "tunings", lambda self, precision: questions)
    speeds.update({"-tuned-2": 3.0, "-tuned": 1.5})
    ladder, manifest = compile("--effort", "quick")
    options = [step for step in ladder["steps"] if step["step"] in ("threads", "branches")]
    assert [(step["what"], step["status"]) for step in options] == [
        ("threads=1", "reverted"), ("threads=2", "kept"), ("inter_threads=2", "reverted"),
    ]  # fmt: skip
    assert options[0]["reason"].endswith(f"{FP32}-tuned-2 is better still")
    (pick,) = ladder["picks"].values()
    assert pick == f"{FP32}-tuned"
    record = next(engine for engine in manifest["engines"] if engine["name"] == pick)
    assert record["sibling"] == FP32


def test_without_time_steps_are_left_out_and_counted(compile, speeds):
    ladder, _ = compile("--time-limit", "0.001")
    assert not ladder["complete"]
    reasons = [step["reason"] for step in ladder["steps"] if step["status"] == "skipped"]
    assert reasons.count("no time: the limit is reached") == len(reasons) > 1
    assert ladder["picks"] == {"onnxruntime-cpu": FP32}


def test_an_interrupted_search_goes_on_where_it_ended(enginesmith, arguments, speeds, monkeypatch):
    speeds.update({"-int8": 2.0})
    more = ["--benchmark", "--baseline", "none", "--rounds", "6", "--slice-s", "0.01"]
    whole, calls = trials.race, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(trials, "race", interrupted)
    monkeypatch.setattr(
        onnxruntime_cpu.OnnxRuntimeCpu,
        "tunings",
        lambda self, precision: (Tuning("threads", ({"threads": 1},), "quick"),),
    )
    assert enginesmith(*arguments, *more).code == 130
    assert not Path(arguments[-1]).exists()
    monkeypatch.setattr(trials, "race", whole)
    assert enginesmith(*arguments, *more).code == 0
    manifest = json.loads((Path(arguments[-1]) / "manifest.json").read_text())
    resumed = {step["step"]: step["resumed"] for step in manifest["ladder"]["steps"]}
    assert resumed == {
        "captured graph": False,
        "simplify": False,
        "precision": True,
        "quantization": True,
        "threads": False,
    }
    assert manifest["verdict"]["passed"]
    assert manifest["ladder"]["picks"] == {"onnxruntime-cpu": "onnxruntime-cpu-int8"}


def test_what_cannot_be_timed_is_kept_only_where_it_is_asked_for(compile):
    pytest.importorskip("tensorrt_rtx")
    ladder, _ = compile(
        "--target",
        "tensorrt-rtx:compute_capabilities=8.9",
        "--align",
        "8",
        "--effort",
        "quick",
    )
    steps = {step["step"]: step for step in ladder["steps"] if step["target"] == "tensorrt-rtx"}
    assert steps["quantization"]["status"] == "skipped"
    assert "cannot be timed on this machine" in steps["quantization"]["reason"]
    assert steps["alignment"]["status"] == "not measured"
    assert ladder["picks"]["tensorrt-rtx"] == "tensorrt-rtx-fp32-aligned"


def test_a_real_stopwatch_finds_an_engine_at_least_as_good_as_the_plain_one(compile):
    ladder, manifest = compile("--effort", "quick")
    assert manifest["verdict"]["passed"]
    assert {step["status"] for step in ladder["steps"]} <= {"start", "kept", "reverted", "skipped"}
    assert all(step["ratio"] for step in ladder["steps"] if step["candidate"] and step["step"] == "precision")
    assert ladder["picks"]["onnxruntime-cpu"] in {engine["name"] for engine in manifest["engines"]}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--objective", "speed", "unknown objective 'speed'"),
        ("--objective", "size=2", "objective 'size=2' cannot be read"),
        ("--effort", "much", "'much' is not one of 'quick', 'default', 'thorough'"),
        ("--time-limit", "0", "field 'time_limit_s' of the call is not valid"),
    ],
)
def test_wrong_options(enginesmith, arguments, option, value, message):
    outcome = enginesmith(*arguments, option, value)
    assert outcome.code == 2
    assert message in outcome.err
