"""Tests of the torch-inductor target that compile nothing; tests/integration compiles one engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from enginesmith.compiler.requirements import check_machine
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
from enginesmith.targets.base import BuildRequest, EngineInfo
from enginesmith.targets.torch_inductor import TorchInductor

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
    folder: Path, module: torch.nn.Module | None = None, log: Callable[[str], None] = print
) -> BuildRequest:
    module = module or Product()
    model = Model("module", Reference(), SIGNATURE, module.eval(), None, "f", 0)
    sample = {"x": np.ones((1, 3), np.float32), "y": np.ones((3, 4), np.float32)}
    return BuildRequest(None, model, SIGNATURE, "fp32", sample, folder, folder / "cache", log)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Takes the place of the compiler: keeps what it is given, and the package is the exported program itself."""
    seen: dict[str, Any] = {}

    def compile(program: Any, *, package_path: str, inductor_configs: dict[str, Any]) -> None:
        seen.update(program=program, configs=inductor_configs)
        Path(package_path).write_bytes(b"package")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: seen["program"].module())
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
        "cpp.threads": 2,
        "cpp.dynamic_threads": False,
    }
    assert (info.entry, info.target, info.options["threads"]) == ("model.pt2", "torch-inductor", 2)


def test_an_engine_asks_for_the_machine_it_was_compiled_for(compiled: dict[str, Any], tmp_path: Path) -> None:
    target = parse_target("torch-inductor")
    info = target.build(make_request(tmp_path))
    check_machine(info, target)
    for key, value in (("torch", "1.0"), ("machine", "pdp11"), ("cpu_flags", "avx1024")):
        other = EngineInfo(**{**info.__dict__, "requires": {**info.requires, key: value}})
        with pytest.raises(EngineMismatchError, match=r"engine .* was built for another"):
            check_machine(other, target)


def test_what_was_compiled_is_compared_with_the_model(
    compiled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: lambda x, y: (torch.zeros(len(x), 4),))
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


@pytest.mark.parametrize("stage", ["torch.export", "compilation"])
def test_a_failure_says_where(
    compiled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TypeError("no kernel")

    owner, name = (torch.export, "export") if stage == "torch.export" else (torch._inductor, "aoti_compile_and_package")
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(BuildError, match=f"TorchInductor failed at {stage}") as caught:
        parse_target("torch-inductor").build(make_request(tmp_path))
    assert caught.value.found == "TypeError: no kernel"
    assert list((tmp_path / "cache").iterdir()) == []


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


def test_a_package_that_is_damaged_is_an_engine_error(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"PK")
    info = EngineInfo("damaged", "torch-inductor", "fp32", "model.pt2", SIGNATURE)
    with pytest.raises(EngineError, match="engine damaged cannot be opened"):
        parse_target("torch-inductor").runner(tmp_path, info)


def test_options_are_checked() -> None:
    with pytest.raises(RecipeError, match="threads of torch-inductor is too small"):
        parse_target("torch-inductor:threads=0")
    assert TorchInductor(freezing=False).options() == {
        "device": "cpu",
        "freezing": False,
        "max_autotune": False,
        "threads": None,
    }
