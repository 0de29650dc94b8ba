"""Engines that were built before: here, on another machine, or by another process at this moment."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from enginesmith.compiler.calibration import Calibration
from enginesmith.compiler.graph import Graph
from enginesmith.compiler.machine import environment
from enginesmith.compiler.recipe import Recipe
from enginesmith.compiler.reuse import described
from enginesmith.compiler.storage import fingerprint
from enginesmith.compiler.storage.cache import Cache
from enginesmith.compiler.storage.entries import scan
from enginesmith.targets import parse_target
from enginesmith.targets.trt import build as trt

EXAMPLE = Path(__file__).with_name("reuse_example.py")
spec = importlib.util.spec_from_file_location("reuse_example", EXAMPLE)
assert spec is not None
assert spec.loader is not None
example = importlib.util.module_from_spec(spec)
sys.modules["reuse_example"] = example
spec.loader.exec_module(example)

NET = '<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { y = Neg(x) }'


def test_an_engine_is_taken_from_the_cache_on_the_same_machine(tmp_path):
    first = example.build(tmp_path / "cache", tmp_path / "1")
    assert (first[1], dict(first[0].details)) == (False, {})
    info, cached, log = example.build(tmp_path / "cache", tmp_path / "2")
    assert (cached, dict(info.details)) == (True, {})
    assert log == ["taken from the cache: same graph, options, versions and machine"]
    (entry,) = scan(tmp_path / "cache", ["engines"])
    assert entry.what == {"model": "net.py:net", "target": "text", "precision": "fp32"}


def test_an_engine_of_another_machine_is_tried_and_described_anew(tmp_path):
    example.build(tmp_path / "cache", tmp_path / "1", machine="a")
    info, cached, log = example.build(tmp_path / "cache", tmp_path / "2", machine="b")
    assert (cached, dict(info.details)) == (True, {"described": "text"})
    assert log == ["taken from the cache: same graph and options, built on another machine"]
    assert '"described"' in (tmp_path / "2" / "engine" / "engine.json").read_text()


def test_an_engine_of_another_machine_that_does_not_work_here_is_built_anew(tmp_path, capsys):
    target = example.Text(works=False)
    example.build(tmp_path / "cache", tmp_path / "1", target, "a")
    _, cached, log = example.build(tmp_path / "cache", tmp_path / "2", target, "b")
    assert not cached
    assert log == ["one in the cache, from another machine, does not work here: illegal instruction"]
    assert capsys.readouterr().out == "builds\nbuilds\n"
    assert example.build(tmp_path / "cache", tmp_path / "3", target, "b")[1]  # what was built here took its place


@pytest.mark.parametrize(("facts", "cached"), [("", True), (None, False)])
def test_a_target_that_does_not_say_what_it_depends_on_shares_with_equal_machines_only(tmp_path, facts, cached):
    target = example.Text(facts=facts)
    example.build(tmp_path / "cache", tmp_path / "1", target, "a")
    assert example.build(tmp_path / "cache", tmp_path / "2", target, "b")[1] is cached
    assert example.build(tmp_path / "cache", tmp_path / "3", target, "a")[1]


def test_an_engine_is_taken_for_the_same_calibration_only(tmp_path):
    def built(name, value=None, precision="fp8", **fields):
        if value is not None:
            np.savez(tmp_path / f"{name}.npz", x=np.float32([value, 0]))
            fields["calibration_data"] = str(tmp_path / f"{name}.npz")
        _, cached, _ = example.build(tmp_path / "cache", tmp_path / name, precision=precision, **fields)
        return cached, (tmp_path / name / "engine" / "model").read_text()

    assert built("1", 3) == (False, "text for [3.0]")
    assert built("2", 3) == (True, "text for [3.0]")
    assert built("3", 4) == (False, "text for [4.0]")
    assert built("4", 3, calibration_samples=1) == (False, "text for [3.0]")
    assert built("5") == (False, "text")
    assert built("6", 3, precision="fp32") == (False, "text")
    assert built("7", 9, precision="fp32") == (True, "text")


def test_an_engine_by_samples_of_a_function_is_built_anew(tmp_path):
    def built(name, value):
        code = f"import numpy as np\ndef read():\n    yield {{'x': np.float32([{value}, 0])}}\n"
        (tmp_path / "data.py").write_text(code)
        fields = {"precision": "fp8", "calibration_data": f"{tmp_path}/data.py:read"}
        _, cached, _ = example.build(tmp_path / "cache", tmp_path / name, **fields)
        return cached, (tmp_path / name / "engine" / "model").read_text()

    assert built("1", 3) == (False, "text for [3.0]")
    assert built("2", 3) == (False, "text for [3.0]")
    assert not list(scan(tmp_path / "cache", ["engines"]))


def test_an_onnx_engine_of_another_machine_says_what_this_ones_runtime_makes_of_it(tmp_path, monkeypatch):
    graph = Graph.from_proto(onnx.parser.parse_model(NET))
    target = parse_target("onnxruntime-cpu")
    first = example.build(tmp_path / "cache", tmp_path / "1", target, "a", graph)[0]
    assert first.details["nodes"] == 1
    monkeypatch.setattr("enginesmith.targets.onnxruntime_cpu.examine", lambda *_: {"nodes": 7, "placement": {}})
    info, cached, _ = example.build(tmp_path / "cache", tmp_path / "2", target, "b", graph)
    assert (cached, info.details["nodes"]) == (True, 7)
    info, cached, _ = example.build(tmp_path / "cache", tmp_path / "3", target, "a", graph)
    assert (cached, info.details["nodes"]) == (True, 1)


def test_two_processes_build_an_engine_once(tmp_path):
    command = [sys.executable, str(EXAMPLE), str(tmp_path / "cache")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    first = subprocess.Popen([*command, str(tmp_path / "1")], **pipes)
    assert first.stdout.readline() == "builds\n"
    second = subprocess.Popen([*command, str(tmp_path / "2")], **pipes)
    assert second.stdout.readline().startswith(f"engine: waits for process {first.pid} on ")
    assert first.communicate("\n", timeout=60)[0] == "False\n"
    told = second.communicate("\n", timeout=60)[0].strip()
    assert told.startswith(f"True; waits for process {first.pid} on ")
    assert told.endswith(
        ", which builds the same engine; taken from the cache: same graph, options, versions and machine"
    )


FOUND = {"version": "10.1.0", "polygraphy": "0.50", "gpu": "H100", "compute_capability": "9.0", "driver": "13.0"}


@pytest.mark.parametrize(
    ("target", "decides"),
    [
        ("tensorrt", {"version", "gpu", "compute_capability"}),
        ("tensorrt-rtx", {"version"}),
    ],
)
def test_which_facts_decide_a_tensorrt_engine(monkeypatch, target, decides):
    def facts(**changed: str):
        monkeypatch.setattr(trt, "look", lambda *_, **__: trt.Found(**{**FOUND, **changed}))
        return parse_target(target).built_for()

    assert {name for name in FOUND if facts(**{name: "other"}) != facts()} == decides


def test_which_facts_decide_a_torch_engine(monkeypatch):
    inductor, script = parse_target("torch-inductor"), parse_target("torchscript")
    here = inductor.built_for()
    assert (here["torch"], list(script.built_for())) == (script.built_for()["torch"], ["torch"])
    monkeypatch.setattr(environment, "_cpu", lambda: {"model": "another"})
    assert inductor.built_for() != here


def test_which_facts_decide_an_onnx_engine(monkeypatch):
    assert parse_target("onnxruntime-cpu").built_for() == parse_target("onnxruntime-cuda").built_for() == {}
    assert list(parse_target("openvino").built_for()) in ([], ["openvino"])  # where it is not installed, no version
    optimized = parse_target("onnxruntime-cpu:optimized_model=true")
    here = optimized.built_for()
    monkeypatch.setattr(environment, "cpu_flags", lambda: frozenset(("avx2", "fma")))
    assert optimized.built_for() != here


def test_numbers_of_another_machine_never_serve(monkeypatch):
    machine = environment.environment()
    own = fingerprint.compile_key(Recipe(model="net.onnx"), machine)
    assert fingerprint.compile_key(Recipe(model="net.onnx"), machine) == own
    monkeypatch.setattr(environment.platform, "node", lambda: "another")
    assert fingerprint.compile_key(Recipe(model="net.onnx"), machine) != own


def test_models_are_named_without_their_folders():
    assert [described(m) for m in ("/a/b/net.py:net", "net.onnx", "<Linear>", "a\\net.pt")] == [
        "net.py:net", "net.onnx", "<Linear>", "net.pt",
    ]  # fmt: skip


def test_statistics_serve_another_machine(tmp_path, monkeypatch):
    class Samples(list):
        description, random, digest = "made up", False, "digest"

    graph = Graph.from_proto(onnx.parser.parse_model(NET))
    samples = Samples([{"x": np.float32([1, 2])}])
    first = Calibration(samples, cache=Cache(tmp_path)).statistics(graph)
    monkeypatch.setattr(environment, "_cpu", lambda: {"model": "another"})
    monkeypatch.setattr(environment.platform, "node", lambda: "another")
    monkeypatch.setattr(Samples, "__iter__", lambda self: pytest.fail("collected again"))
    assert Calibration(samples, cache=Cache(tmp_path)).statistics(graph).digest == first.digest
