"""Engines below full precision, on the samples with their real weights and data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from enginesmith.compiler.calibration import Statistics

SAMPLES = Path(__file__).parents[2] / "samples"


def compile_digits(enginesmith, out: Path, *options: object):
    recipe = SAMPLES / "digits" / "recipe.yaml"
    outcome = enginesmith(
        "compile", "--recipe", recipe, "--target", "onnxruntime-cpu", "--no-benchmark", "-o", out, *options
    )
    manifest = json.loads((out / "manifest.json").read_text()) if out.exists() else None
    return outcome, manifest


def test_digits_in_8_bits_are_fused_and_as_accurate(enginesmith, tmp_path):
    outcome, manifest = compile_digits(enginesmith, tmp_path / "out", "--precision", "fp32,int8")
    assert outcome.code == 0, outcome
    full, int8 = manifest["engines"]
    assert abs(int8["validation"]["metric"]["value"] - full["validation"]["metric"]["value"]) <= 0.003
    assert int8["size_bytes"] < full["size_bytes"] / 3
    operators = int8["details"]["operators"]
    assert operators["QLinearConv"] >= 2
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul"} & set(operators)


def test_calibration_is_kept_hashed_and_read_again(enginesmith, tmp_path):
    outcome, manifest = compile_digits(
        enginesmith, tmp_path / "out", "--precision", "int8", "--calibration-samples", 64
    )
    assert outcome.code == 0, outcome
    (record,) = manifest["calibration"]
    assert record["samples"] == 64
    assert record["data"] == "calibration.npz"
    assert record["file"] in manifest["files"]
    kept = Statistics.load(tmp_path / "out" / record["file"])
    assert kept.digest == record["digest"]
    assert len(kept) == record["tensors"] > 4
    (quantize,) = [step for step in manifest["passes"] if step["text"].startswith("quantize-static")]
    assert quantize["engines"] == ["onnxruntime-cpu-int8"]
    assert {limit["name"] for limit in quantize["details"]["limits"]} <= set(kept)


def test_mixed_precision_keeps_the_budget_where_8_bits_do_not(enginesmith, tmp_path):
    data = SAMPLES / "digits" / "test.npz"  # the budget is spent on what it is judged on
    budget = ("--budget", "relative_l2=0.01", "--calibration-data", data)
    outcome, manifest = compile_digits(enginesmith, tmp_path / "out", "--precision", "int8,mixed", *budget)
    assert outcome.code == 1
    int8, mixed = manifest["engines"]
    assert "onnxruntime-cpu-int8 exceeds the budget relative_l2=0.01" in outcome.out
    assert int8["validation"]["budget"]["holds"] is False
    assert mixed["validation"]["budget"]["holds"] is True
    assert mixed["validation"]["passed"] is True
    assert mixed["details"]["operators"]["QLinearConv"] > 0
    chosen = next(step for step in manifest["passes"] if step["text"].startswith("precision"))["details"]["chosen"]
    assert 0 < chosen["cost"] < 1
    assert "what stays in full precision" in (tmp_path / "out" / "report.html").read_text()
    assert enginesmith("debug", tmp_path / "out", "-e", "onnxruntime-cpu-int8", "-q").code == 1


def test_kept_nodes_stay(enginesmith, tmp_path):
    outcome, manifest = compile_digits(enginesmith, tmp_path / "out", "--precision", "int8", "--keep", "fp32", "*")
    assert outcome.code == 0, outcome
    (int8,) = manifest["engines"]
    assert not any(name.startswith("QLinear") for name in int8["details"]["operators"])
    (quantize,) = [step for step in manifest["passes"] if step["text"].startswith("quantize-static")]
    assert quantize["text"] == "quantize-static:keep=*"
    assert {refusal["reason"] for refusal in quantize["refusals"]} == {"kept by choice: '*'"}


def test_an_lstm_in_8_bits(enginesmith, tmp_path):
    recipe = SAMPLES / "characters" / "recipe.yaml"
    common = (
        "--target",
        "onnxruntime-cpu",
        "--precision",
        "fp32,int8-dynamic",
        "--no-benchmark",
        "-o",
        tmp_path / "out",
    )
    outcome = enginesmith("compile", "--recipe", recipe, *common)
    assert outcome.code == 0, outcome
    full, int8 = json.loads((tmp_path / "out" / "manifest.json").read_text())["engines"]
    assert int8["details"]["operators"]["DynamicQuantizeLSTM"] == 1
    assert int8["validation"]["metric"]["value"] >= full["validation"]["metric"]["value"] - 0.003


def test_calibration_data_that_are_broken_further_on(enginesmith, model, arguments):
    x = np.zeros((16, 4), np.float32)
    x[9, 2] = np.nan
    np.savez(model / "broken.npz", x=x)
    outcome = enginesmith(*arguments, "--precision", "fp32,int8", "--calibration-data", model / "broken.npz")
    assert outcome.code == 2
    assert "broken.npz, batch 3: input 'x' holds NaN or Inf" in outcome.err
    assert not (model / "out").exists()


def test_quantization_refuses_made_up_data_unless_told(enginesmith, model, arguments):
    without = [argument for argument in arguments if argument != "--data" and not str(argument).endswith(".npz")]
    outcome = enginesmith(*without, "--precision", "int8")
    assert outcome.code == 2
    assert "precision 'int8' needs calibration data" in outcome.err
    assert "--random-calibration" in outcome.err
    outcome = enginesmith(*without, "--target", "torch-inductor:device=cuda", "--precision", "fp8")
    assert outcome.code == 2
    assert "precision 'fp8' needs calibration data" in outcome.err
    outcome = enginesmith(
        *without, "--precision", "int8", "--random-calibration", "--tolerance", "int8.relative_l2=0.5"
    )
    assert outcome.code in (0, 1)
    assert "made-up data: ranges on real data will differ" in outcome.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "fp32", "no-such-node*"], "no-such-node"),
        (["--keep", "int8", "*"], "unknown precision to keep nodes in 'int8'"),
        (["--budget", "relative_l2"], "budget 'relative_l2' cannot be read|has a bound that cannot be"),
        (["--budget", "metric=0.01"], "the budget is on the metric, and there is none"),
        (["--quantization", "rouding=gptq"], "unknown option of quantization 'rouding'"),
        (["--calibration-data", "no-such.npz"], "data 'no-such.npz' does not exist|no-such.npz"),
    ],
)
def test_bad_options(enginesmith, model, arguments, options, message):
    outcome = enginesmith(*arguments, "--precision", "int8", *options)
    assert outcome.code == 2, outcome
    assert re.search(message, outcome.err)
    assert not (model / "out").exists()
