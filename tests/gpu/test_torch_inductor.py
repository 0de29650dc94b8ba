"""The two targets that run in torch, on a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.compiler.validation.reference import ReferenceOutputs
from enginesmith.compiler.validation.validator import validate
from enginesmith.targets import parse_target
from enginesmith.targets.base import BuildRequest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("torchscript", "fp32"),
        ("torchscript", "fp16"),
        ("torch-inductor", "fp32"),
        ("torch-inductor", "fp16"),
        ("torch-inductor", "bf16"),
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
    request = BuildRequest(None, model, model.signature, precision, sample, tmp_path, tmp_path / "cache", print)
    target = parse_target(f"{name}:device=cuda")
    info = target.build(request)
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
