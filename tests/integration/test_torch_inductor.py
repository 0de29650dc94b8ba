"""Engines compiled by TorchInductor, from the model to results."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import enginesmith
from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.compiler.validation.reference import ReferenceOutputs
from enginesmith.compiler.validation.validator import validate
from enginesmith.errors import DataError
from enginesmith.targets import parse_target
from enginesmith.targets.base import BuildRequest

random = runpy.run_path(str(Path(__file__).parents[1] / "random_model.py"))["random"]


@pytest.mark.slow
def test_an_engine_is_compiled_validated_and_timed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Flatten(), torch.nn.Linear(256, 10),
    )  # fmt: skip
    model = load_model(network, inputs=parse_inputs(["input:1x1x8x8"], ["input:0=1..4..16"]))
    sample = {"input": np.random.default_rng(0).standard_normal((4, 1, 8, 8)).astype(np.float32)}
    log: list[str] = []
    request = BuildRequest(
        None, model, model.signature, "fp32", sample, tmp_path, tmp_path / "cache", log.append, timeout_s=300
    )
    target = parse_target("torch-inductor:threads=1")
    info = target.build(request)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["model.pt2"]
    assert list((tmp_path / "cache").iterdir()) == []

    runner = target.runner(tmp_path, info)
    (tmp_path / "record").mkdir()
    record = ReferenceOutputs.record(model, [sample], tmp_path / "record")
    assert validate("inductor", runner, record, precision="fp32")["passed"]
    given = {"input": torch.from_numpy(sample["input"]).permute(0, 1, 3, 2)}  # strides that the code does not expect
    expected = model.reference.run({"input": np.ascontiguousarray(given["input"].numpy())})
    (name,) = expected
    np.testing.assert_allclose(runner.run(given)[name].numpy(), expected[name], rtol=1e-4, atol=1e-5)
    assert len(runner.bind(sample).timed(2)[0]) == 2
    with pytest.raises(DataError, match="input 'input' has the wrong shape"):
        runner.run({"input": np.zeros((4, 1, 8, 6), np.float32)})


@pytest.mark.slow
def test_a_decoder_is_compiled_and_generates(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=48, n_embd=24, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None
    )
    model = random(lambda: transformers.GPT2LMHeadModel(config))
    bundle = enginesmith.compile(
        model, tmp_path / "bundle", decoder={"max_length": 32, "batch": 1}, targets=["torch-inductor"], passes=[],
        precisions=["fp32"], benchmark=False, max_samples=1,
    )  # fmt: skip
    folder = tmp_path / "bundle" / "engines" / "torch-inductor-fp32"
    assert {path.name for path in folder.glob("*.pt2")} == {"one.pt2", "any.pt2"}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (folder / "weights.safetensors").stat().st_size < 4 * parameters + 10_000
    ids = torch.tensor([[3, 1, 4]])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    with bundle.load() as engine:
        assert engine.generate([3, 1, 4], 20) == expected[:, 3:].tolist()
    code = (
        "import sys, enginesmith; print(enginesmith.load(sys.argv[1]).generate([3, 1, 4], 2)); "
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, bundle.path], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == [str(expected[:, 3:5].tolist()), "False", ""]  # the compiler stays out
