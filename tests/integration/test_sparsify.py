"""Sparse weights from the command line: beside dense ones where a target has kernels, refused where it has none."""

import dataclasses
import json

import numpy as np
import pytest

from enginesmith.targets.onnxruntime_cpu import OnnxRuntimeCpu

MODEL = """
import torch


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3),
    )
"""


LOOSE = ["--tolerance", "fp32.max_abs=1", "--tolerance", "fp32.cosine=0.5", "--tolerance", "fp32.top1=0"]


@pytest.fixture
def compile(enginesmith, tmp_path):
    """Compiles a small convolutional network with sparse weights; gives the outcome and the manifest."""
    (tmp_path / "model.py").write_text(MODEL)
    x = np.random.default_rng(0).standard_normal((32, 16, 6, 6)).astype(np.float32)
    np.savez(tmp_path / "data.npz", input=x)
    common = [
        "--input",
        "input:1x16x6x6",
        "--dynamic",
        "input:0=1..4..8",
        "--data",
        f"{tmp_path}/data.npz",
        "--sparsify",
        "2:4",
    ]

    def run(*arguments):
        out = tmp_path / "out"
        outcome = enginesmith("compile", f"{tmp_path}/model.py:net", *common, *arguments, "-o", out)
        assert outcome.code == 0, outcome
        return outcome, json.loads((out / "manifest.json").read_text()), out

    return run


def statuses(manifest):
    return {engine["name"]: engine["status"] for engine in manifest["engines"]}


def test_a_target_with_sparse_kernels_gets_both_engines_and_one_without_says_so(compile):
    pytest.importorskip("tensorrt_rtx")
    targets = ["--target", "tensorrt-rtx:compute_capabilities=8.9", "--target", "onnxruntime-cpu"]
    outcome, manifest, out = compile(*targets, "--precision", "fp16", "--no-benchmark", "--require", "onnxruntime-cpu")
    built = "ready" if statuses(manifest)["tensorrt-rtx-fp16"] == "ready" else "built"
    assert statuses(manifest) == {
        "tensorrt-rtx-fp16": built,
        "tensorrt-rtx-fp16-sparse": built,
        "onnxruntime-cpu-fp16": "ready",
        "onnxruntime-cpu-fp16-sparse": "unavailable",
    }
    engines = {engine["name"]: engine for engine in manifest["engines"]}
    refused = engines["onnxruntime-cpu-fp16-sparse"]["reason"]
    assert refused == "onnxruntime-cpu has no kernels for 2:4 sparse weights"
    assert "SPARSE_WEIGHTS" not in engines["tensorrt-rtx-fp16"]["details"]["flags"]
    assert "SPARSE_WEIGHTS" in engines["tensorrt-rtx-fp16-sparse"]["details"]["flags"]
    assert engines["tensorrt-rtx-fp16-sparse"]["sibling"] == "tensorrt-rtx-fp16"
    info = json.loads((out / "engines/tensorrt-rtx-fp16-sparse/engine.json").read_text())
    assert set(info["details"]["sparse"]) == {"eligible", "picked", "source"}
    (record,) = (record for record in manifest["passes"] if record["text"] == "sparsify")
    assert record["changes"] == {"layers made sparse": 2, "weights zeroed": (32 * 16 * 9 + 32 * 16) // 2}
    assert [row["method"] for row in record["details"]["sparse"]] == ["sparsegpt", "sparsegpt"]
    assert [refusal["reason"] for refusal in record["refusals"]] == [
        "its 3 outputs are no multiple of 8, as sparse Tensor Cores need"
    ]
    assert "2:4 sparse layers" in (out / "report.html").read_text()
    assert "tensorrt-rtx-fp16-sparse was not measured against tensorrt-rtx-fp16" in " ".join(outcome.out.split())


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (
            ("--budget", "relative_l2=1e-3"),
            "its results are not close enough to the reference: budget relative_l2=0.001",
        ),
        (("--budget", "relative_l2=0.9", *LOOSE), "it is not faster than"),
    ],
)
def test_sparse_weights_go_where_they_are_wrong_or_not_faster(compile, monkeypatch, budget, reason):
    """On a target that claims kernels and has none, so that the two engines are equally fast."""
    claimed = dataclasses.replace(OnnxRuntimeCpu.capabilities, sparsity=("2:4",))
    monkeypatch.setattr(OnnxRuntimeCpu, "capabilities", claimed)
    monkeypatch.setattr("enginesmith.compiler.gains.FASTER", 100.0)  # whatever else this machine does
    options = [
        "--precision",
        "fp32",
        "--target",
        "onnxruntime-cpu",
        "--baseline",
        "none",
        "--rounds",
        "6",
        "--slice-s",
        "0.02",
    ]
    outcome, manifest, _ = compile(*options, *budget)
    dense, sparse = manifest["engines"]
    assert (dense["dropped"], sparse["dropped"][: len(reason)]) == ("", reason)
    assert manifest["verdict"]["best"] == "onnxruntime-cpu-fp32"
    assert f"onnxruntime-cpu-fp32-sparse is dropped: {reason}" in " ".join(outcome.out.split())
    ratios = {timing["candidate"]: timing["against_sibling"] for timing in manifest["benchmark"]["timings"]}
    assert ratios["onnxruntime-cpu-fp32"] is None
    assert ratios["onnxruntime-cpu-fp32-sparse"]["against"] == "onnxruntime-cpu-fp32"
