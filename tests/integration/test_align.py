"""Aligned dimensions from the command line: an engine beside each plain one, kept only where it is faster."""

import json
from pathlib import Path

import pytest

WIDE = ["--argument", "width=1001"]


@pytest.fixture
def compile(enginesmith, arguments):
    """Compiles the small model; gives the outcome and the manifest."""

    def run(*more):
        outcome = enginesmith(*arguments, *more)
        assert outcome.code == 0, outcome
        return outcome, json.loads((Path(arguments[-1]) / "manifest.json").read_text())

    return run


def test_an_aligned_engine_computes_the_same(compile, arguments):
    outcome, manifest = compile(*WIDE, "--align", "8")
    plain, aligned = manifest["engines"]
    assert (plain["name"], aligned["name"]) == ("onnxruntime-cpu-fp32", "onnxruntime-cpu-fp32-aligned")
    assert (aligned["status"], aligned["sibling"], aligned["dropped"]) == ("ready", plain["name"], "")
    for engine in (plain, aligned):
        assert engine["validation"]["outputs"][0]["relative_l2"] < 1e-6
        assert engine["validation"]["tolerance"] == plain["validation"]["tolerance"]
    (record,) = (record for record in manifest["passes"] if record["text"] == "align")
    assert [(row["before"], row["after"]) for row in record["details"]["aligned"]] == [(1001, 1008)]
    assert "1 dimension grown by" in (Path(arguments[-1]) / "report.html").read_text()
    assert "was not measured against onnxruntime-cpu-fp32" in " ".join(outcome.out.split())


def test_auto_does_nothing_where_there_are_no_tensor_cores(compile):
    _, manifest = compile(*WIDE, "--align", "auto")
    assert [engine["name"] for engine in manifest["engines"]] == ["onnxruntime-cpu-fp32"]


def test_an_aligned_engine_that_is_not_faster_is_dropped(compile, monkeypatch):
    monkeypatch.setattr("enginesmith.compiler.gains.FASTER", 100.0)  # whatever else this machine does
    measured = ["--precision", "fp32", "--benchmark", "--baseline", "none", "--rounds", "6", "--slice-s", "0.02"]
    outcome, manifest = compile(*WIDE, "--align", "8", *measured)
    plain, aligned = manifest["engines"]
    assert plain["dropped"] == ""
    assert aligned["dropped"].startswith("it is not faster than onnxruntime-cpu-fp32")
    assert manifest["verdict"]["best"] == "onnxruntime-cpu-fp32"
    assert "onnxruntime-cpu-fp32-aligned is dropped" in " ".join(outcome.out.split())


def test_a_model_with_nothing_to_align_says_so(compile):
    outcome, manifest = compile("--align", "8")
    (record,) = (record for record in manifest["passes"] if record["text"] == "align")
    assert not record["modified"]
    assert "onnxruntime-cpu-fp32-aligned is as onnxruntime-cpu-fp32, nothing was aligned" in " ".join(
        outcome.out.split()
    )


def test_both_precisions_and_tensorrt_rtx(compile):
    pytest.importorskip("tensorrt_rtx")
    target = ["--target", "tensorrt-rtx:compute_capabilities=8.9", "--precision", "fp16", "--precision", "int8"]
    _, manifest = compile(*WIDE, "--align", "auto", *target)
    texts = [record["text"] for record in manifest["passes"] if record["text"].startswith("align")]
    assert texts == ["align", "align:multiple=16"]
    names = [engine["name"] for engine in manifest["engines"] if engine["name"].startswith("tensorrt-rtx")]
    assert names == [
        "tensorrt-rtx-fp16", "tensorrt-rtx-fp16-aligned", "tensorrt-rtx-int8", "tensorrt-rtx-int8-aligned",
    ]  # fmt: skip
    assert all(engine["status"] in ("ready", "built") for engine in manifest["engines"])
