"""Aligned dimensions through ONNX Runtime's CUDA provider."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import enginesmith

pytestmark = pytest.mark.gpu


class Wide(torch.nn.Module):
    """An MLP of 770 neurons before 1001 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = torch.nn.Linear(512, 770), torch.nn.Linear(770, 1001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(torch.nn.functional.gelu(self.up(x)))
        return made


def test_both_engines_are_right_and_the_slower_one_is_dropped(tmp_path):
    torch.manual_seed(0)
    x = np.random.default_rng(0).standard_normal((4096, 512), dtype=np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    bundle = enginesmith.compile(
        Wide().eval(),
        tmp_path / "bundle",
        inputs=["x:4096x512"],
        data=str(tmp_path / "data.npz"),
        targets=["onnxruntime-cuda"],
        precisions=["fp16"],
        align="auto",
    )
    plain, aligned = bundle.manifest["engines"]
    assert (plain["name"], aligned["name"]) == ("onnxruntime-cuda-fp16", "onnxruntime-cuda-fp16-aligned")
    assert plain["validation"]["passed"]
    assert aligned["validation"]["passed"]
    (record,) = (record for record in bundle.manifest["passes"] if record["text"] == "align")
    assert [(row["before"], row["after"]) for row in record["details"]["aligned"]] == [(770, 776), (1001, 1008)]
    ratios = {timing["candidate"]: timing["against_sibling"] for timing in bundle.manifest["benchmark"]["timings"]}
    ratio = ratios["onnxruntime-cuda-fp16-aligned"]
    assert bool(aligned["dropped"]) == (ratio["low"] <= 1.02)
