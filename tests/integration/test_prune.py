"""Pruned engines from the command line: built beside whole ones, judged, and dropped or kept with the reason."""

import json
from pathlib import Path

import numpy as np
import pytest

SAMPLE = Path(__file__).parents[2] / "samples" / "digits"
QUICK = ["--precision", "fp32", "--baseline", "none", "--rounds", "6", "--slice-s", "0.02", "--max-samples", "8"]
MODEL = """
import torch


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3, padding=1), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, 3),
    )
"""


def flat(text):
    return " ".join(text.split())


def read(out):
    return json.loads((out / "manifest.json").read_text())


def passes_of(manifest, name):
    return [record for record in manifest["passes"] if name in record["engines"] and record["variant"] != "all"]


@pytest.fixture
def compile(enginesmith, tmp_path):
    """Compiles a small convolutional network; gives the outcome and the manifest."""
    (tmp_path / "model.py").write_text(MODEL)
    x = np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", input=x)

    def run(*arguments, data=True, code=0):
        shapes = ["--input", "input:1x3x8x8", "--dynamic", "input:0=1..8..16", "--target", "onnxruntime-cpu"]
        given = ["--data", tmp_path / "data.npz"] if data else []
        out = tmp_path / "out"
        outcome = enginesmith("compile", f"{tmp_path}/model.py:net", *shapes, *given, *arguments, "-o", out)
        assert outcome.code == code, outcome
        return outcome, read(out) if code in (0, 1) else {}

    return run


@pytest.mark.slow
def test_digits_are_pruned_in_both_precisions_within_the_budget(enginesmith, tmp_path):
    out = tmp_path / "out"
    common = [
        "compile",
        "--recipe",
        SAMPLE / "recipe.yaml",
        "--target",
        "onnxruntime-cpu",
        "--data",
        SAMPLE / "test.npz",
    ]
    goal = ["--prune", "macs=0.7", "--calibration-data", SAMPLE / "test.npz", "--precision", "fp32,int8"]
    outcome = enginesmith(*common, *goal, "--budget", "metric=0.01", *QUICK, "-o", out)
    assert outcome.code == 0, outcome
    manifest = read(out)
    engines = {engine["name"]: engine for engine in manifest["engines"]}
    names = ["onnxruntime-cpu-fp32", "onnxruntime-cpu-int8"]
    assert list(engines) == [one for name in names for one in (name, f"{name}-pruned")]
    for name in names:
        pruned = engines[f"{name}-pruned"]
        assert pruned["status"] == "ready"
        assert pruned["sibling"] == name
        assert pruned["validation"]["passed"] or "not close enough" in pruned["dropped"]
        assert not engines[name]["dropped"]
        record = passes_of(manifest, f"{name}-pruned")[0]
        assert record["text"].startswith("prune:macs=0.7")
        told = record["details"]["macs"]
        assert told["after"] <= 0.7 * told["before"]
        assert all(row["after"] % 8 == 0 for row in record["details"]["prune"])
        assert {row["group"] for row in record["details"]["sensitivity"]}
        assert record["details"]["fits"]
        if pruned["dropped"]:
            assert f"{name}-pruned is dropped: {pruned['dropped']}"[:60] in flat(outcome.out)
    weights = [engines[f"onnxruntime-cpu-fp32{end}"]["size_bytes"] for end in ("", "-pruned")]
    assert weights[1] < weights[0]


def test_without_data_weights_decide_and_the_verdict_stands(compile):
    loose = ["--tolerance", "fp32.max_abs=9", "--tolerance", "fp32.cosine=0", "--tolerance", "fp32.top1=0"]
    _, manifest = compile("--prune", "0.3", "--budget", "relative_l2=0.99", *loose, *QUICK, data=False)
    assert [engine["name"] for engine in manifest["engines"]] == ["onnxruntime-cpu-fp32", "onnxruntime-cpu-fp32-pruned"]
    (record,) = passes_of(manifest, "onnxruntime-cpu-fp32-pruned")
    assert record["details"]["importance"] == "l2"
    assert record["details"]["fits"] == []
    assert [(row["before"], row["after"]) for row in record["details"]["prune"]] == [(32, 16), (32, 16)]
    assert any(refusal["reason"].startswith("nothing is fitted") for refusal in record["refusals"])


def test_an_engine_that_is_wrong_is_dropped_and_the_whole_one_stays(compile):
    outcome, manifest = compile("--prune", "0.7", "--budget", "relative_l2=1e-6", *QUICK)
    whole, pruned = manifest["engines"]
    assert (whole["dropped"], manifest["verdict"]["best"]) == ("", "onnxruntime-cpu-fp32")
    assert pruned["dropped"].startswith("its results are not close enough to the reference")
    assert "onnxruntime-cpu-fp32-pruned is dropped: its results are not close" in flat(outcome.out)


def test_an_engine_that_nothing_was_pruned_in_says_so(compile):
    outcome, manifest = compile("--prune", "0.05", "--no-benchmark")
    assert "onnxruntime-cpu-fp32-pruned is as onnxruntime-cpu-fp32, nothing was pruned: of the multiples of" in flat(
        outcome.out
    )
    assert not passes_of(manifest, "onnxruntime-cpu-fp32-pruned")[0]["modified"]


def test_options_of_pruning(compile):
    _, manifest = compile(
        "--prune", "ratio=0.5", "--pruning", "importance=hessian", "--pruning", "multiple=4", "--no-benchmark"
    )
    (record,) = passes_of(manifest, "onnxruntime-cpu-fp32-pruned")
    assert record["details"]["importance"] == "hessian"
    assert record["text"] == "prune:ratio=0.5,importance=hessian,multiple=4"


def test_a_recipe_says_the_same(compile, tmp_path):
    (tmp_path / "prune.yaml").write_text("prune: 0.5\npruning: {importance: l1, refit: false, keep: [nothing*]}\n")
    outcome, _ = compile("--recipe", tmp_path / "prune.yaml", "--no-benchmark", code=2)
    assert "no dimension that can be pruned matches 'nothing*'" in flat(outcome.err)


@pytest.mark.parametrize("goal", ["0", "1", "-1", "abc", "30%", "macs=1.2", "speed=0.5"])
def test_goals_that_cannot_be(compile, goal):
    outcome, _ = compile(f"--prune={goal}", code=2)
    assert f"'{goal}' is no goal of pruning" in flat(outcome.err)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("importance=magic", "option 'importance' of 'prune' has an unknown value"),
        ("importence=l1", "unknown option of 'prune' 'importence'"),
        ("multiple=0", "multiple is at least 1, found 0"),
    ],
)
def test_options_that_cannot_be(compile, option, message):
    outcome, _ = compile("--prune", "0.3", "--pruning", option, code=2)
    assert message in flat(outcome.err)


def test_importance_from_data_needs_data(compile):
    outcome, _ = compile("--prune", "0.3", "--pruning", "importance=obs", "--precision", "fp32", data=False, code=2)
    message = "engine 'onnxruntime-cpu-fp32-pruned' needs calibration data, to see what its layers read"
    assert message in flat(outcome.err)
