from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from enginesmith.cli import main

MODEL = """
import torch


class Net(torch.nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.hidden = torch.nn.Linear(4, width)
        self.head = torch.nn.Linear(width, 3)

    def forward(self, x):
        return self.head(torch.relu(self.hidden(x)))


def net(width=8):
    torch.manual_seed(0)
    return Net(width)
"""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def enginesmith(monkeypatch, capsys, own_cache) -> Callable[..., Outcome]:
    """Runs the command line in this process, with a cache of its own."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["enginesmith", *map(str, arguments)])
        with pytest.raises(SystemExit, match=r"^\d+$") as ended:
            main()
        captured = capsys.readouterr()
        return Outcome(int(str(ended.value.code)), captured.out, captured.err)

    return run


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder with model.py:net (x: batch x 4 -> 3) and data.npz."""
    (tmp_path / "model.py").write_text(MODEL)
    x = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    return tmp_path


@pytest.fixture
def arguments(model) -> list[str]:
    """A compile of that model, quick."""
    return [
        "compile", f"{model}/model.py:net", "--input", "x:1x4", "--dynamic", "x:0=1..4..8",
        "--data", f"{model}/data.npz", "--target", "onnxruntime-cpu", "--no-benchmark", "-o", f"{model}/out",
    ]  # fmt: skip
