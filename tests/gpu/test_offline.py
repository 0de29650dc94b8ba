"""`enginesmith run --gpus`: a process a GPU, with the outputs of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pynvml
import pytest

import enginesmith
from enginesmith.compiler.storage.files import hashes

pytestmark = pytest.mark.gpu

MODEL = """
import torch


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)).eval()
"""


def gpus() -> list[int]:
    """All that there are."""
    pynvml.nvmlInit()
    return list(range(pynvml.nvmlDeviceGetCount()))


def test_all_gpus_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.py").write_text(MODEL)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((1000, 64), dtype=np.float32))
    bundle = tmp_path / "bundle"
    enginesmith.compile(
        f"{tmp_path / 'model.py'}:net",
        bundle,
        inputs=["input:1x64"],
        dynamic=["input:0=1..32..64"],
        targets=["torch-inductor:device=cuda"],
        precisions=["fp32"],
        benchmark=False,
    )
    one = enginesmith.run(bundle, tmp_path / "x.npy", tmp_path / "one", shard_rows=100)
    all_of_them = enginesmith.run(bundle, tmp_path / "x.npy", tmp_path / "all", shard_rows=100, gpus=gpus())
    (name,) = next(iter(one))
    np.testing.assert_array_equal(all_of_them[name], one[name])
    assert hashes(tmp_path / "all").keys() == hashes(tmp_path / "one").keys()
    assert len(one.shards) == 10
