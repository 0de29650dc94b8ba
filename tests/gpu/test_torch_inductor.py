"""The two targets that run in torch, on a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.compiler.validation.reference import ReferenceOutputs
from enginesmith.compiler.validation.validator import validate
from enginesmith.errors import EngineError
from enginesmith.targets import parse_target
from enginesmith.targets.base import BuildRequest
from enginesmith.targets.inductor.runners import SHAPES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("torchscript", "fp32"),
        ("torchscript", "fp16"),
        ("torch-inductor", "fp32"),
        ("torch-inductor", "fp16"),
        ("torch-inductor", "bf16"),
        ("torch-inductor", "fp8"),
    ],
)
def test_an_engine_on_the_gpu_is_right_and_stays_on_the_device(tmp_path: Path, name: str, precision: str) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.BatchNorm2d(32), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(512, 16),
    )  # fmt: skip
    model = load_model(network, inputs=parse_inputs(["input:1x3x32x32"], ["input:0=1..4..16"]))
    sample = {"input": np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)}
    request = BuildRequest(
        None, model, model.signature, precision, sample, tmp_path, tmp_path / "cache", print, calibration=[sample]
    )
    target = parse_target(f"{name}:device=cuda")
    info = target.build(request)
    assert info.details.get("fp8") == ({"layers": 1, "samples": 4} if precision == "fp8" else None)
    runner = target.runner(tmp_path, info)
    (tmp_path / "record").mkdir()
    record = ReferenceOutputs.record(model, [sample], tmp_path / "record")
    found = validate(name, runner, record, precision=precision)
    assert found["passed"], found["outputs"]

    (output,) = runner.run({"input": torch.from_numpy(sample["input"]).cuda()}).values()
    assert output.is_cuda
    assert output.dtype is torch.float32
    host, device = runner.bind(sample).timed(5)
    assert device is not None
    assert len(host) == len(device) == 5
    assert min(device) > 0


class Network(torch.nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = torch.nn.Linear(8, 32), torch.nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.other(torch.nn.functional.gelu(self.one(x)))
        return y


class Chosen(torch.nn.Module):
    """Looks at values on the host, which no CUDA graph can."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x.sum(1) > 0].sum(0, keepdim=True) + x


def built(folder: Path, module: torch.nn.Module, sample: dict[str, np.ndarray], options: str = "") -> Any:
    """The engine of a module with input x, and how it was built."""
    model = load_model(module, inputs=parse_inputs(["x:1x8"], ["x:0=1..4..16"]))
    request = BuildRequest(None, model, model.signature, "fp32", sample, folder, folder / "cache", print)
    target = parse_target(f"torch-inductor:device=cuda{options}")
    info = target.build(request)
    return target.runner(folder, info), info.details["cuda_graph"] if not options else None


def test_calls_are_cuda_graphs_whose_results_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Network().eval()
    random = np.random.default_rng(0)
    samples = [random.standard_normal((rows, 8)).astype(np.float32) for rows in (4, 2, 4, 1, *range(3, 16), 4)]
    runner, graph = built(tmp_path, network, {"x": samples[0]})
    assert graph == {"used": True, "reason": ""}
    with torch.no_grad():
        wanted = [network(torch.from_numpy(x)) for x in samples]
    given = [torch.from_numpy(x).cuda() for x in samples]
    found = [next(iter(runner.run({"x": x}).values())) for x in given]
    assert len(runner._captured) == SHAPES
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=1e-5, rtol=1e-5)

    def called(number: int) -> float:
        with torch.cuda.stream(torch.cuda.Stream()):
            (y,) = runner.run({"x": given[number % 3]}).values()
            return float((y.cpu() - wanted[number % 3]).abs().max())

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(called, range(200))) < 1e-5
    bound = runner.bind({"x": samples[0]})
    bound.timed(3)
    (y,) = bound.outputs().values()
    np.testing.assert_allclose(y, wanted[0], atol=1e-5)
    runner.close()
    with pytest.raises(EngineError, match="is closed"):
        runner.run({"x": samples[0]})


def test_a_call_that_waits_for_the_gpu_is_no_graph(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    runner, graph = built(tmp_path, Chosen(), {"x": x})
    assert not graph["used"]
    assert graph["reason"].startswith("its launches cannot be captured: ")
    (y,) = runner.run({"x": x}).values()
    np.testing.assert_allclose(y, Chosen()(torch.from_numpy(x)), atol=1e-5)
