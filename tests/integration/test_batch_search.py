"""The batch search on engines that run: in a compile, on a bundle, and into the end of memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx.parser
import psutil
import pytest

import enginesmith as es
from enginesmith.compiler.batch.search import search_batches
from enginesmith.compiler.recipe import Recipe
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.compiler.storage.memory import release
from enginesmith.targets.base import EngineInfo

ROOT = Path(__file__).parents[2]
ENGINE = "onnxruntime-cpu-fp32"
QUICK = ["--rounds", "6", "--slice-s", "0.01"]


@pytest.fixture
def digits(enginesmith, tmp_path) -> Path:
    """A compile of the sample with a batch search and a limit that any machine keeps."""
    recipe, bundle = ROOT / "samples/digits/recipe.yaml", tmp_path / "digits"
    outcome = enginesmith(
        "compile", "--recipe", recipe, "--target", "onnxruntime-cpu", "--precision", "fp32", "--no-benchmark",
        "-o", bundle, "--batch-search", "--p99", "20s", *QUICK,
    )  # fmt: skip
    assert outcome.code == 0, outcome
    assert "search batch" in outcome.err
    assert f"{ENGINE}: largest batch 64, and no larger one was asked for" in outcome.out
    assert f"{ENGINE}: most throughput within a p99 of 20000 ms at batch" in outcome.out
    return bundle


def test_compile_searches_the_best_engine(digits):
    (curve,) = json.loads((digits / "manifest.json").read_text())["batches"]
    assert (curve["engine"], curve["axis"], curve["device"], curve["p99_limit_ms"]) == (ENGINE, "batch", "cpu", 20000)
    assert (curve["largest"], curve["largest_is_limit"]) == (64, True)
    by_batch = {point["batch"]: point for point in curve["points"]}
    assert {1, 2, 4, 8, 16, 32, 64} <= by_batch.keys()
    assert all(point["fits"] and point["p99_ms"] >= point["p50_ms"] > 0 for point in by_batch.values())
    assert all(by_batch[batch]["memory_bytes"] > 10_000_000 for batch in (1, 64))
    rates = {batch: point["samples_per_s"] for batch, point in by_batch.items()}
    assert rates[curve["best"]] == max(rates.values()) > rates[1]
    assert curve["saturation"] == min(batch for batch, rate in rates.items() if rate >= 0.95 * max(rates.values()))
    with es.load(digits) as engine:
        assert engine.best_batch == curve["best"]
        image = np.zeros((engine.best_batch, 1, 8, 8), np.float32)
        assert engine(image=image).shape == (engine.best_batch, 10)


def test_a_limit_that_no_engine_keeps_is_a_negative_verdict(enginesmith, model, arguments):
    outcome = enginesmith(*arguments, "--p99", "1us", "--max-batch", "2", *QUICK)
    assert outcome.code == 1
    verdict = json.loads((model / "out" / "manifest.json").read_text())["verdict"]
    assert verdict["passed"] is False
    assert verdict["reasons"][0].startswith(f"{ENGINE}: no batch size keeps a p99 of 0.001 ms, the smallest, 1, takes")
    with es.load(model / "out") as engine:
        assert engine.best_batch is None


def test_bench_searches_a_bundle_and_beyond_its_axis(enginesmith, model, arguments):
    assert enginesmith(*arguments).code == 0
    outcome = enginesmith("bench", model / "out", "--max-batch", "12", "--json", "--quiet", *QUICK)
    assert (outcome.code, outcome.err) == (0, "")
    (curve,) = json.loads(outcome.out)
    assert (curve["largest"], curve["largest_is_limit"], curve["p99_limit_ms"]) == (12, True, None)
    assert {1, 2, 4, 8, 12} <= {point["batch"] for point in curve["points"] if point["fits"]}
    outcome = enginesmith("bench", model / "out", "--p99", "1us", "--max-batch", "2", *QUICK)
    assert outcome.code == 1
    assert f"{ENGINE}: no batch size keeps a p99 of 0.001 ms, the smallest, 1, takes" in outcome.out


def test_what_cannot_be_searched_is_refused(enginesmith, model, arguments):
    where = arguments.index("--dynamic")
    fixed = [*arguments[:where], *arguments[where + 2 :]]
    outcome = enginesmith(*fixed, "--batch-search")
    assert (outcome.code, outcome.out) == (2, "")
    assert "no batch size to search: no input has a dynamic first axis" in outcome.err
    assert not (model / "out").exists()
    assert enginesmith(*fixed).code == 0
    outcome = enginesmith("bench", model / "out", "--batch-search")
    assert outcome.code == 2
    assert "to do: compile with --dynamic x:0=1..8..64" in outcome.err
    outcome = enginesmith("bench", model / "out", "--batch-search", "--baseline", "torch")
    assert outcome.code == 2
    assert "a batch search compares the sizes of an engine, and has no baseline" in outcome.err


HUNGRY = """
<ir_version: 10, opset_import: ["" : 18]>
agraph (float[batch, 1] x, float[1] scale) => (float[batch, 1] y)
  <int64[2] wide = {1, 262144}, int64[1] last = {1}>
{
  a = Expand(x, wide)
  b = Mul(a, scale)
  y = ReduceMean<keepdims = 1>(b, last)
}
"""
"""A batch takes two intermediate results of 1 MiB a sample at once, and inputs and outputs of next to nothing."""

SIGNATURE = Signature(
    inputs=(TensorSpec("x", "float32", ("batch", 1)), TensorSpec("scale", "float32", (1,))),
    outputs=(TensorSpec("y", "float32", ("batch", 1)),),
    axes={"batch": AxisRange(1, 64, 100_000)},
)


def test_the_end_of_memory_is_found_and_nothing_is_lost(tmp_path):
    """256 MiB hold 128 samples or fewer: the allocator of ONNX Runtime takes more than it needs."""
    folder = tmp_path / "engines" / ENGINE
    folder.mkdir(parents=True)
    onnx.save(onnx.parser.parse_model(HUNGRY), folder / "model.onnx")
    EngineInfo(ENGINE, "onnxruntime-cpu", "fp32", "model.onnx", SIGNATURE, options={"threads": 1}).write(folder)
    sample = {"x": np.ones((2, 1), np.float32), "scale": np.ones(1, np.float32)}
    process = psutil.Process()
    release()
    before = process.memory_info().rss
    (curve,) = search_batches(
        tmp_path,
        [{"name": ENGINE, "status": "ready"}],
        sample,
        SIGNATURE,
        Recipe(rounds=6, slice_s=0.01, p99="1ms"),
        lambda fraction, what: None,
        limit_bytes=256 << 20,
    )
    release()
    assert process.memory_info().rss - before < 32 << 20
    assert not any("batch.worker" in " ".join(child.cmdline()) for child in process.children(recursive=True))

    assert 32 <= curve["largest"] <= 160
    assert curve["largest_is_limit"] is False
    by_batch = {point["batch"]: point for point in curve["points"]}
    beyond = [point for point in by_batch.values() if not point["fits"]]
    assert min(point["batch"] for point in beyond) <= curve["largest"] * 33 / 32 + 1
    assert all(point["reason"].startswith("out of memory: ") for point in beyond), beyond
    assert max(by_batch) <= 256  # it was not doubled on and on
    assert by_batch[curve["largest"]]["memory_bytes"] > by_batch[1]["memory_bytes"] + 30 * (1 << 20)
    assert by_batch[curve["largest"]]["p50_ms"] > 0
    assert curve["saturation"] is not None
