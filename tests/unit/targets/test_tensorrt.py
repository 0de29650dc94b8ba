import dataclasses
import os
import sys

import pytest

from enginesmith.compiler.machine import environment
from enginesmith.compiler.signature import parse_inputs
from enginesmith.errors import BuildError, EngineMismatchError, RecipeError, TargetUnavailableError
from enginesmith.targets import parse_target
from enginesmith.targets.base import BuildRequest, EngineInfo
from enginesmith.targets.tensorrt_rtx import _runtime_cache
from enginesmith.targets.trt import build as trt
from enginesmith.targets.trt.build import Found, profiles, reproduce

SIGNATURE = parse_inputs(["image:1x3x8x8", "scale:1"], ["image:0=1..4..8"])

H100 = Found(
    version="8.6.0", polygraphy="0.53.6", gpu="NVIDIA H100", compute_capability="9.0", driver="CUDA 12.8"
)  # fmt: skip
ADA = dataclasses.replace(H100, version="1.7.1.116", gpu="NVIDIA RTX 4090", compute_capability="8.9")
NO_GPU = Found(version="8.6.0", polygraphy="0.53.6", gpu_problem="the NVIDIA driver cannot be loaded: libcuda.so.1")
NOTHING = Found(problem="ModuleNotFoundError: No module named 'tensorrt'")


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine have what was found."""

    def machine(found):
        monkeypatch.setattr(environment, "compute_capability", lambda device=0: found.compute_capability)
        monkeypatch.setattr(trt, "look", lambda module, *, to_run=False: found)

    return machine


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (NOTHING, "TensorRT cannot be imported: ModuleNotFoundError: No module named 'tensorrt'"),
        (NO_GPU, "the NVIDIA driver cannot be loaded: libcuda.so.1"),
        (dataclasses.replace(H100, version="8.5.3"), "TensorRT 8.5.3 is not supported (8.6 to 11 are)"),
        (dataclasses.replace(H100, version="12.0.0"), "TensorRT 12.0.0 is not supported (8.6 to 11 are)"),
        (
            dataclasses.replace(H100, polygraphy=None, problem="ImportError: polygraphy"),
            "Polygraphy cannot be imported beside TensorRT: ImportError: polygraphy",
        ),
    ],
)
def test_why_tensorrt_cannot_be_used(machine, found, reason, tmp_path):
    machine(found)
    target = parse_target("tensorrt")
    availability = target.availability()
    assert (availability.build, availability.run, availability.reason) == (False, False, reason)
    assert availability.install
    request = BuildRequest(None, None, SIGNATURE, "fp32", {}, tmp_path, tmp_path, print)
    with pytest.raises(TargetUnavailableError, match=reason.split("(")[0]):
        target.build(request)


def test_tensorrt_is_available(machine):
    machine(H100)
    availability = parse_target("tensorrt").availability()
    assert (availability.build, availability.run, availability.reason) == (True, True, "")
    assert availability.versions["tensorrt"] == "8.6.0"


@pytest.mark.parametrize(
    ("found", "run", "reason"),
    [
        (ADA, True, ""),
        (H100, False, "TensorRT-RTX does not know compute capability 9.0 (NVIDIA H100)"),
        (NO_GPU, False, "the NVIDIA driver cannot be loaded: libcuda.so.1"),
    ],
)
def test_tensorrt_rtx_builds_wherever_it_can_be_imported(machine, found, run, reason):
    machine(found)
    availability = parse_target("tensorrt-rtx").availability()
    assert (availability.build, availability.run, availability.reason) == (True, run, reason)


def test_tensorrt_rtx_is_missing(machine, tmp_path):
    machine(NOTHING)
    target = parse_target("tensorrt-rtx")
    assert not target.availability().build
    assert "pip install 'enginesmith[tensorrt-rtx]'" in target.availability().install
    request = BuildRequest(None, None, SIGNATURE, "fp32", {}, tmp_path, tmp_path, print)
    with pytest.raises(TargetUnavailableError, match="TensorRT-RTX cannot be imported"):
        target.build(request)
    with pytest.raises(TargetUnavailableError, match="TensorRT-RTX cannot be imported"):
        target.runner(tmp_path, info("tensorrt-rtx"))


@pytest.mark.parametrize(
    ("version", "opset", "attention"),
    [
        ("8.6.0", (9, 17), False), ("9.3.0", (9, 17), False), ("10.9.0", (9, 22), False),
        ("10.14.1", (9, 23), True), ("11.1.0", (9, 23), True), (None, (9, 23), True),
    ],
)  # fmt: skip
def test_opsets_and_what_is_fused_are_those_of_the_version(machine, version, opset, attention):
    machine(dataclasses.replace(H100, version=version))
    assert parse_target("tensorrt").opset_range() == opset
    fused = ("fuse-transformer:scheme=tensorrt",) if attention else ()
    assert parse_target("tensorrt").rewrites("fp16") == ("fuse-transformer:scheme=onnx", *fused, "fuse-embeddings")
    for target in ("tensorrt", "tensorrt-rtx"):
        assert parse_target(target).rewrites("fp32") == ("fuse-transformer:scheme=onnx", "fuse-embeddings")
    assert "fuse-transformer:scheme=tensorrt" in parse_target("tensorrt-rtx").rewrites("bf16")


def info(target, **requires):
    return EngineInfo(f"{target}-fp32", target, "fp32", "model.plan", SIGNATURE, requires=requires)


@pytest.mark.parametrize(
    ("target", "found", "requires", "message"),
    [
        ("tensorrt", H100, {"tensorrt": "10.9"}, r"(?s)another version\n.*expected: tensorrt 10.9\n.*found: 8.6"),
        ("tensorrt", H100, {"compute_capability": "8.9"}, r"(?s)another machine\n.*found: 9.0.*compile"),
        (
            "tensorrt-rtx",
            ADA,
            {"compute_capability": "8.0,12.0"},
            r"expected: compute capability 8.0 or 12.0\n.*found: 8.9",
        ),
    ],
)
def test_an_engine_for_another_machine(machine, tmp_path, target, found, requires, message):
    machine(found)
    with pytest.raises(EngineMismatchError, match=message):
        parse_target(target).runner(tmp_path, info(target, **requires))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensorrt:workspace_gib=0", "workspace_gib of tensorrt is not positive"),
        ("tensorrt:builder_level=6", "builder_level of tensorrt is out of range"),
        ("tensorrt:aux_streams=-1", "aux_streams of tensorrt is negative"),
        ("tensorrt:profiles=many", "'profiles' of 'tensorrt' has an unknown value"),
        ("tensorrt-rtx:compute_capabilities=8.6+9.0", r"(?s)names no GPU that it builds for.*found: 9.0"),
    ],
)
def test_options_out_of_range(text, message):
    with pytest.raises(RecipeError, match=message):
        parse_target(text)


@pytest.mark.parametrize(
    "text",
    [
        "tensorrt",
        "tensorrt:workspace_gib=2.5,profiles=points,cuda_graph=false",
        "tensorrt-rtx:compute_capabilities=8.6+8.9",
    ],
)
def test_options_print_as_they_are_read(text):
    assert str(parse_target(text)) == text


def test_one_profile_covers_the_ranges():
    assert profiles(SIGNATURE, "range") == [
        {"image": [(1, 3, 8, 8), (4, 3, 8, 8), (8, 3, 8, 8)], "scale": [(1,), (1,), (1,)]}
    ]


def test_further_profiles_are_fixed_to_the_points():
    made = profiles(parse_inputs(["x:1x2"], ["x:0=1..8..8"]), "points")
    assert made == [{"x": [(1, 2), (8, 2), (8, 2)]}, {"x": [(1, 2)] * 3}, {"x": [(8, 2)] * 3}]
    assert len(profiles(parse_inputs(["x:1x2"]), "points")) == 1


def test_the_command_that_builds_the_same():
    options = {"builder_level": 5, "workspace_gib": 2, "compute_capabilities": ["8.6"]}
    assert reproduce("tensorrt", profiles(parse_inputs(["x:1x2"]), "range"), options, ["FP16"]) == (
        "polygraphy convert model.onnx --convert-to trt -o model.plan --fp16 --trt-min-shapes 'x:[1,2]'"
        " --trt-opt-shapes 'x:[1,2]' --trt-max-shapes 'x:[1,2]' --builder-optimization-level 5"
        " --pool-limit workspace:2G"
    )
    command = reproduce("tensorrt_rtx", [], {**options, "workspace_gib": None}, ["STRONGLY_TYPED"])
    assert command.startswith("POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy convert")
    assert command.endswith("--compute-capabilities 8.6")


def test_a_model_without_a_graph(machine, tmp_path):
    machine(H100)
    request = BuildRequest(None, None, SIGNATURE, "fp32", {}, tmp_path, tmp_path, print)
    with pytest.raises(BuildError, match="tensorrt builds from a graph, and this model has none"):
        parse_target("tensorrt").build(request)


def test_the_runtime_cache_is_that_of_engine_version_and_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"one")
    first = _runtime_cache(plan, ADA)
    assert first == _runtime_cache(plan, ADA)
    assert first.parent == tmp_path / "cache" / "tensorrt-rtx"
    assert first != _runtime_cache(plan, H100)
    plan.write_bytes(b"two")
    assert first != _runtime_cache(plan, ADA)
    monkeypatch.setenv("ENGINESMITH_CACHE", str(plan))  # a file is no folder
    assert _runtime_cache(plan, ADA) is None


def test_the_environment_names_the_interpreter(monkeypatch):
    monkeypatch.setenv("ENGINESMITH_TENSORRT_PYTHON", "/opt/python")
    assert trt.command("tensorrt")[0] == "/opt/python"
    assert not trt.in_process("tensorrt")
    assert trt.command("tensorrt_rtx")[0] == sys.executable


def test_an_interpreter_that_cannot_be_started(monkeypatch):
    monkeypatch.setenv("ENGINESMITH_TENSORRT_PYTHON", "/nowhere/python")
    availability = parse_target("tensorrt").availability()
    named = "No such file or directory (ENGINESMITH_TENSORRT_PYTHON is /nowhere/python)"
    assert f"the tensorrt worker cannot be started: {named}" in availability.reason


def test_what_is_found_is_asked_for_once(monkeypatch, tmp_path):
    count = tmp_path / "count"
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\necho >> {count}\nexec {sys.executable} "$@"\n')
    os.chmod(script, 0o755)
    monkeypatch.setenv("ENGINESMITH_NO_SUCH_MODULE_PYTHON", str(script))
    for _ in range(2):
        found = trt.look("no_such_module")
        assert found.problem == "ModuleNotFoundError: No module named 'no_such_module'"
    assert count.read_text() == "\n"


@pytest.mark.parametrize(
    ("version", "passes"),
    [
        ("8.6.0", ("pin", "quantize-static:scheme=tensorrt-8")),
        ("10.9.0", ("opset:least=19", "quantize-static:scheme=tensorrt", "cast:to=fp16")),
        (None, ("opset:least=19", "quantize-static:scheme=tensorrt", "cast:to=fp16")),
    ],
)
def test_int8_is_lowered_as_networks_are_typed(machine, version, passes):
    machine(dataclasses.replace(H100, version=version))
    assert parse_target("tensorrt").lowering("int8") == passes
    assert parse_target("tensorrt").lowering("fp16") == ("cast:to=fp16",)


def test_what_the_version_and_the_gpu_do_not_have_is_refused(machine):
    machine(H100)
    assert parse_target("tensorrt").refusals()["bf16"] == "bfloat16 needs TensorRT 10 or newer, found 8"
    machine(dataclasses.replace(H100, version="10.9.0"))
    assert parse_target("tensorrt").refusals() == {}
    machine(NOTHING)
    assert parse_target("tensorrt").refusals() == {}


def test_tensorrt_rtx_refuses_what_one_of_its_gpus_does_not_have():
    assert set(parse_target("tensorrt-rtx").refusals()) == {"fp8"}
    assert parse_target("tensorrt-rtx:compute_capabilities=8.9+12.0").refusals() == {}
    reason = parse_target("tensorrt-rtx:compute_capabilities=7.5").refusals()["bf16"]
    assert reason == "bfloat16 needs compute capability 8.0 or higher, not 7.5; leave it out of compute_capabilities"
