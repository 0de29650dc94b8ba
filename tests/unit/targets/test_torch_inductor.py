"""Tests of the torch-inductor target that compile nothing; tests/integration compiles one engine."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from enginesmith.compiler.machine.requirements import check_machine
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.compiler.sources import Model
from enginesmith.errors import (
    BuildError,
    DataError,
    EngineError,
    EngineMismatchError,
    RecipeError,
    TargetUnavailableError,
)
from enginesmith.targets import parse_target
from enginesmith.targets._worker import Worker
from enginesmith.targets.base import BuildRequest, EngineInfo
from enginesmith.targets.inductor.worker import Commands, command
from enginesmith.targets.torch_inductor import TorchInductor

PACKAGE = "enginesmith.targets.inductor.package.Package"

SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", "my axis")), TensorSpec("y", "float32", ("my axis", "fixed"))),
    (TensorSpec("z", "float32", ("batch", 4)),),
    {"batch": AxisRange(1, 1, 8), "my axis": AxisRange(2, 3, 5), "fixed": AxisRange(4, 4, 4)},
)


class Product(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x @ y,)


class Reference:
    """A reference that is only ever reset."""

    def run(self, inputs: Any) -> dict[str, np.ndarray]:
        return {"z": inputs["x"] @ inputs["y"]}

    def reset(self) -> None:
        """No state."""


def make_request(
    folder: Path, module: torch.nn.Module | None = None, log: Callable[[str], None] = print, precision: str = "fp32"
) -> BuildRequest:
    module = module or Product()
    model = Model("module", Reference(), SIGNATURE, module.eval(), None, "f", 0)
    sample = {"x": np.ones((1, 3), np.float32), "y": np.ones((3, 4), np.float32)}
    return BuildRequest(None, model, SIGNATURE, precision, sample, folder, folder / "cache", log)


class InProcess:
    """Takes the place of the worker process: its commands are run here."""

    def __init__(self, *_: object, **__: object) -> None:
        self._commands = Commands()

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._commands.close()

    def call(self, command: str, *, timeout_s: float, **arguments: Any) -> Any:
        assert timeout_s > 0
        return json.loads(json.dumps(getattr(self._commands, command)(**json.loads(json.dumps(arguments)))))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Takes the place of the compiler: keeps what it is given, and the package is the exported program itself."""
    seen: dict[str, Any] = {}

    def compile(program: Any, *, package_path: str, inductor_configs: dict[str, Any]) -> None:
        seen.update(program=program, configs=inductor_configs)
        Path(package_path).write_bytes(b"package")

    monkeypatch.setattr("enginesmith.targets.torch_inductor.Worker", InProcess)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile)
    monkeypatch.setattr(PACKAGE, lambda path, **_: seen["program"].module())
    return seen


def test_axes_with_a_range_stay_dynamic(compiled: dict[str, Any], tmp_path: Path) -> None:
    info = parse_target("torch-inductor:threads=2").build(make_request(tmp_path))
    shapes = [
        [str(size) for size in node.meta["val"].shape]
        for node in compiled["program"].graph.nodes
        if node.op == "placeholder"
    ]
    assert shapes[0][0].startswith("s")
    assert shapes[0][1] == shapes[1][0] != shapes[0][0]
    assert shapes[1][1] == "4"
    ranges = sorted((str(r.lower), str(r.upper)) for r in compiled["program"].range_constraints.values())
    assert ranges == [("1", "8"), ("2", "5")]
    assert compiled["configs"] == {
        "freezing": True,
        "max_autotune": False,
        "coordinate_descent_tuning": False,
        "cpp.threads": 2,
        "cpp.dynamic_threads": False,
    }
    assert list((tmp_path / "cache").iterdir()) == []
    assert (info.entry, info.target, info.options["threads"]) == ("model.pt2", "torch-inductor", 2)


def test_bf16_computes_in_bfloat16_and_keeps_inputs_and_outputs(compiled: dict[str, Any], tmp_path: Path) -> None:
    request = make_request(tmp_path, precision="bf16")
    info = parse_target("torch-inductor").build(request)
    (product,) = (node for node in compiled["program"].graph.nodes if "matmul" in str(node.target))
    assert product.meta["val"].dtype is torch.bfloat16
    outputs = parse_target("torch-inductor").runner(tmp_path, info).run(request.sample)
    assert outputs["z"].dtype == np.float32
    np.testing.assert_array_equal(outputs["z"], np.full((1, 4), 3))


def test_an_engine_asks_for_the_machine_it_was_compiled_for(compiled: dict[str, Any], tmp_path: Path) -> None:
    target = parse_target("torch-inductor")
    info = target.build(make_request(tmp_path))
    check_machine(info, target)
    for key, value in (("torch", "1.0"), ("machine", "pdp11"), ("cpu_flags", "avx1024")):
        other = EngineInfo(**{**info.__dict__, "requires": {**info.requires, key: value}})
        with pytest.raises(EngineMismatchError, match=r"engine .* was built for another"):
            check_machine(other, target)


class Encoder(torch.nn.Module):
    """Layers of sizes that FP8 takes, and one of others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.widen, self.mix = torch.nn.Linear(4, 32), torch.nn.Linear(32, 32)
        self.out = torch.nn.Linear(32, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.out(self.mix(torch.relu(self.widen(x @ y)))),)


def as_reference(module: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """The module, which the reference runs from now on."""
    module = module.eval().requires_grad_(False)

    def run(_: object, inputs: Any) -> dict[str, np.ndarray]:
        return {"z": module(*map(torch.from_numpy, inputs.values()))[0].numpy()}

    monkeypatch.setattr(Reference, "run", run)
    return module


def test_fp8_is_in_linear_layers_by_calibration(
    compiled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = as_reference(Encoder(), monkeypatch)
    logged: list[str] = []
    request = make_request(tmp_path, module, logged.append, "fp8")
    generator = np.random.default_rng(0)
    other = {"x": generator.random((4, 3), np.float32), "y": generator.random((3, 4), np.float32)}
    samples = [request.sample, other]
    info = parse_target("torch-inductor").build(dataclasses.replace(request, calibration=samples))
    assert info.details == {"fp8": {"layers": 1, "samples": 5}}
    assert "1 linear layers in FP8, by 5 samples" in logged
    products = [n for n in compiled["program"].graph.nodes if n.target is torch.ops.aten._scaled_mm.default]
    assert len(products) == 1
    assert compiled["program"].range_constraints
    with pytest.raises(BuildError, match="a linear layer reads is not finite"):
        parse_target("torch-inductor").build(
            dataclasses.replace(request, calibration=[{**samples[0], "x": np.full((1, 3), np.inf, np.float32)}])
        )
    with pytest.raises(BuildError, match="no linear layer has sizes that FP8 takes"):
        parse_target("torch-inductor").build(
            dataclasses.replace(make_request(tmp_path, precision="fp8"), calibration=samples)
        )


class Changing(torch.nn.Module):
    """Changes what its layers read between them, through a view."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other, self.out = (torch.nn.Linear(*sizes) for sizes in ((16, 16), (16, 16), (16, 4)))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z = (x @ y).repeat(1, 4)
        view = z.view(-1, 16)
        first = self.one(view)
        z.mul_(5)
        return (self.out(first + self.other(view)),)


def test_layers_read_what_there_is_when_they_read_it(
    compiled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = as_reference(Changing(), monkeypatch)
    request = make_request(tmp_path, module, precision="fp8")
    info = parse_target("torch-inductor").build(dataclasses.replace(request, calibration=[request.sample]))
    assert info.details["fp8"]["layers"] == 2
    found = compiled["program"].module()(*map(torch.from_numpy, request.sample.values()))[0].numpy()
    wanted = request.model.reference.run(request.sample)["z"]
    assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)


def test_fp8_needs_calibration_data_and_a_gpu_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_request(tmp_path, precision="fp8")
    with pytest.raises(RecipeError, match="precision fp8 needs calibration data, to see the ranges of what linear"):
        parse_target("torch-inductor").build(request)
    decoder = dataclasses.replace(request.signature, states={"x": "z"})
    with pytest.raises(BuildError, match="products of a decoder have no FP8 here"):
        parse_target("torch-inductor").build(dataclasses.replace(request, signature=decoder))
    assert "add device=cuda" in parse_target("torch-inductor").refusals()["fp8"]
    found = {None: {}, "8.9": {}, "9.0": {}, "10.0": {}, "8.6": {"fp8": "FP8 needs compute capability 8.9 or higher, "}}
    for capability, refusals in found.items():
        monkeypatch.setattr(
            "enginesmith.compiler.machine.environment.compute_capability", lambda found=capability: found
        )
        told = parse_target("torch-inductor:device=cuda").refusals()
        assert {name: reason.partition("not")[0] for name, reason in told.items()} == refusals


def test_what_was_compiled_is_compared_with_the_model(
    compiled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PACKAGE, lambda path, **_: lambda x, y: (torch.zeros(len(x), 4),))
    with pytest.raises(BuildError, match="the compiled module does not do what the model does at batch=1, my axis=3"):
        parse_target("torch-inductor").build(make_request(tmp_path))


def test_calls_with_other_shapes_are_refused_before_they_read_too_far(compiled: dict[str, Any], tmp_path: Path) -> None:
    target = parse_target("torch-inductor")
    runner = target.runner(tmp_path, target.build(make_request(tmp_path)))
    inputs = {"x": np.ones((2, 5), np.float32), "y": np.ones((5, 4), np.float32)}
    assert runner.run(inputs)["z"].tolist() == [[5.0] * 4] * 2
    for call in (runner.run, runner.bind):
        with pytest.raises(DataError, match="input 'y' has the wrong shape"):
            call({**inputs, "y": np.ones((4, 4), np.float32)})


def test_a_failing_export_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TypeError("no such dimension")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(BuildError, match=r"TorchInductor failed at torch\.export") as caught:
        parse_target("torch-inductor").build(make_request(tmp_path))
    assert caught.value.found == "TypeError: no such dimension"
    assert list((tmp_path / "cache").iterdir()) == []


SAY = "import sys, os, time; print('linking', file=sys.stderr, flush=True); open(sys.argv[1], 'w').close(); "


@pytest.mark.parametrize(
    ("code", "message", "hint"),
    [
        ("os.kill(os.getpid(), 11)", "crashed with SIGSEGV during 'compile'", "another version or other options"),
        ("os.kill(os.getpid(), 9)", r"was killed \(SIGKILL\) .* memory ran out", "give it more memory"),
        ("time.sleep(600)", "took longer than 2 s for 'compile' and was stopped", "allow more time"),
    ],
)
def test_a_compiler_that_crashes_or_hangs_is_a_failed_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str, hint: str
) -> None:
    package = tmp_path / "model.pt2"
    child = [sys.executable, "-c", SAY + code, str(package)]
    monkeypatch.setattr("enginesmith.targets.torch_inductor.command", lambda: child)
    log: list[str] = []
    request = dataclasses.replace(make_request(tmp_path, log=log.append), timeout_s=2)
    with pytest.raises(BuildError, match=f"TorchInductor in its worker process {message}") as caught:
        parse_target("torch-inductor").build(request)
    assert caught.value.found == "the log ends with\n    linking"
    assert hint in str(caught.value.hint)
    assert "linking" in log
    assert not package.exists()
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_engine_that_crashes_in_the_check_is_no_wrong_result(
    compiled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise BuildError("the worker crashed")

    monkeypatch.setattr(Commands, "run", crash)
    with pytest.raises(BuildError, match=r"^the worker crashed$"):
        parse_target("torch-inductor").build(make_request(tmp_path))


def test_an_engine_that_refuses_inputs_in_the_check_is_told_with_their_sizes(
    compiled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("size 3 was recorded")

    monkeypatch.setattr(PACKAGE, lambda path, **_: refuse)
    with pytest.raises(BuildError, match="does not do what the model does at batch=1, my axis=3") as caught:
        parse_target("torch-inductor").build(make_request(tmp_path))
    assert "size 3 was recorded" in str(caught.value.found)


def test_the_worker_process_tells_its_errors(tmp_path: Path) -> None:
    arguments = {"programs": {str(tmp_path / "none.pt2"): ""}, "scratch": str(tmp_path), "configs": {}}
    with (
        Worker(command(), name="the worker") as worker,
        pytest.raises(BuildError, match=r"the worker failed: ModuleNotFoundError: No module named 'no_such_library'"),
    ):
        worker.call("compile", timeout_s=60, libraries=["no_such_library"], **arguments)
    with Worker(command(), name="the worker") as worker, pytest.raises(BuildError, match="failed: no engine is loaded"):
        worker.call("reset", timeout_s=60)


def test_the_worker_process_ends_with_its_parent_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, time\nprint('busy', file=sys.stderr, flush=True)\ntime.sleep(600)\n"
    (tmp_path / "compiles_for_long.py").write_text(code)
    (scratch := tmp_path / "scratch").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    request = {"programs": {}, "scratch": str(scratch), "libraries": ["compiles_for_long"], "configs": {}}
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command(), text=True, **pipes) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(json.dumps({"command": "compile", **request}) + "\n")
        process.stdin.flush()
        assert process.stderr.readline() == "busy\n"
        process.stdin.close()
        assert process.wait(60) == 1
    assert not scratch.exists()


def test_the_worker_process_gets_the_libraries_whose_operators_are_used(
    compiled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @torch.library.custom_op("made_up_library::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    double.register_fake(torch.empty_like)

    class Double(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (double(x @ y) / 2,)

    def stop(_: Commands, **arguments: Any) -> None:
        wanted.extend(arguments["libraries"])
        raise BuildError("that is all")

    wanted: list[str] = []
    monkeypatch.setitem(sys.modules, "made_up_library", types.ModuleType("made_up_library"))
    monkeypatch.setattr(Commands, "compile", stop)
    with pytest.raises(BuildError, match="that is all"):
        parse_target("torch-inductor").build(make_request(tmp_path, Double()))
    assert wanted == ["made_up_library"]


def test_torchscript_is_refused(tmp_path: Path) -> None:
    scripted = torch.jit.trace(Product(), (torch.ones(1, 3), torch.ones(3, 4)))  # type: ignore[no-untyped-call]
    with pytest.raises(BuildError, match=r"torch\.export does not take TorchScript"):
        parse_target("torch-inductor").build(make_request(tmp_path, scripted))


def test_building_needs_a_compiler_and_running_does_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    target = parse_target("torch-inductor")
    state = target.availability()
    assert (state.build, state.run, state.reason) == (False, True, "no C++ compiler 'no-such-compiler'")
    with pytest.raises(TargetUnavailableError, match=r"no C\+\+ compiler 'no-such-compiler'"):
        target.build(make_request(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="how libraries are linked differs elsewhere")
def test_a_compiler_with_a_static_library_of_its_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "static g++"
    compiler.write_text('#!/bin/sh\nexec g++ -static-libstdc++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    state = TorchInductor().availability()
    assert (state.build, state.run) == (False, True)
    assert state.reason.startswith(f"{compiler} links no shared C++ library")
    assert "CXX=/usr/bin/g++" in state.install


@pytest.mark.parametrize(
    ("home", "reason"),
    [(None, "no CUDA toolkit"), ("", r"no .*/include/cuda\.h")],
)
def test_building_for_a_gpu_needs_the_cuda_toolkit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: str | None, reason: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None if home is None else str(tmp_path))
    state = parse_target("torch-inductor:device=cuda").availability()
    assert (state.build, state.run) == (False, True)
    assert re.fullmatch(reason, state.reason)
    assert "CUDA_HOME" in state.install


def test_building_for_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(TargetUnavailableError, match="no package triton, which compiles kernels for the GPU"):
        parse_target("torch-inductor:device=cuda").build(make_request(Path("never")))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"device": "cuda"}, 2),
        ({"device": "cuda", "max_autotune": True}, 1),
        ({"device": "cuda", "coordinate_descent": True}, 1),
        ({"max_autotune": True}, 2),
    ],
    ids=str,
)
def test_programs_that_are_measured_on_a_gpu_are_compiled_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], expected: int
) -> None:
    monkeypatch.setattr("enginesmith.compiler.machine.environment.cores", lambda: 8)
    assert TorchInductor(**options)._processes(3) == expected


def test_weights_are_not_frozen_on_a_gpu() -> None:
    assert TorchInductor(device="cpu")._configs(stateful=False)["freezing"]
    assert not TorchInductor(device="cuda")._configs(stateful=False)["freezing"]
    assert not TorchInductor(device="cpu")._configs(stateful=True)["freezing"]


def test_a_package_that_is_damaged_is_an_engine_error(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"PK")
    info = EngineInfo("damaged", "torch-inductor", "fp32", "model.pt2", SIGNATURE)
    with pytest.raises(EngineError, match="engine damaged cannot be opened"):
        parse_target("torch-inductor").runner(tmp_path, info)


def test_options_are_checked() -> None:
    with pytest.raises(RecipeError, match="threads of torch-inductor is too small"):
        parse_target("torch-inductor:threads=0")
    with pytest.raises(RecipeError, match="coordinate_descent=true searches kernels for a GPU"):
        parse_target("torch-inductor:coordinate_descent=true")
    assert TorchInductor(freezing=False).options() == {
        "device": "cpu",
        "freezing": False,
        "max_autotune": False,
        "coordinate_descent": False,
        "cuda_graph": True,
        "threads": None,
    }


def test_a_gpu_is_ready_before_a_package_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr("torch.cuda.init", lambda: done.append("ready"))
    monkeypatch.setattr(PACKAGE, lambda path, **_: done.append(path.name))
    TorchInductor(device="cuda")._load(Path("model.pt2"), single_threaded=True)
    TorchInductor()._load(Path("other.pt2"), single_threaded=False)
    assert done == ["ready", "model.pt2", "other.pt2"]
