"""A release: two compiles of a model, compared, with everything that a pipeline keeps."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import enginesmith as es
from enginesmith.testing import assert_engine_close

form = runpy.run_path(str(Path(__file__).parents[1] / "junit_form.py"))
ENGINE = "onnxruntime-cpu-fp32"


def test_the_new_release_is_compared_with_the_last(enginesmith, model, arguments):
    both = [*arguments, "--precision", "fp32,fp16"]
    assert enginesmith(*both, "-o", model / "last", "--junit", model / "compile.xml").code == 0
    root = form["check_form"](model / "compile.xml")
    assert form["outcome"](root, f"enginesmith.compile.{ENGINE}", "build")[0] == "passed"
    assert form["outcome"](root, "enginesmith.compile.onnxruntime-cpu-fp16", "output output")[0] == "passed"

    assert enginesmith("validate", model / "last", "--junit", model / "validate.xml", "-q").code == 0
    root = form["check_form"](model / "validate.xml")
    _, _, output = form["outcome"](root, f"enginesmith.validate.{ENGINE}", "output output")
    assert "samples: 4" in output

    same = enginesmith(
        "compare", f"{model}/last#{ENGINE}", f"{model}/last#onnxruntime-cpu-fp16", "--no-benchmark", "--json"
    )
    found = json.loads(same.out)
    assert (same.code, found["same_model"], found["verdict"]["results"]) == (0, True, "equal")
    assert found["results"]["b"]["outputs"][0]["relative_l2"] > found["results"]["a"]["outputs"][0]["relative_l2"]

    trained = {"hidden.weight": torch.ones(8, 4), "hidden.bias": torch.zeros(8), "head.bias": torch.ones(3)}
    torch.save({**trained, "head.weight": torch.eye(3, 8)}, model / "new.pt")
    assert enginesmith(*arguments, "--weights", model / "new.pt", "-o", model / "new").code == 0
    quick = ["--rounds", 6, "--slice-s", 0.01, "--sizes", "batch=4"]
    outcome = enginesmith("compare", model / "last", model / "new", *quick, "--fail-on", "accuracy")
    assert outcome.code == 0, outcome
    assert "A and B were made from different models or weights" in outcome.out
    strict = enginesmith("compare", model / "last", model / "new", "--no-benchmark", "--fail-on", "results")
    assert strict.code == 1
    assert "regressed: results, output: different" in strict.out


def test_a_failed_compile_is_a_failed_case(enginesmith, model, arguments):
    outcome = enginesmith(*arguments, "--tolerance", "fp32.relative_l2=1e-12", "--junit", model / "junit.xml")
    assert outcome.code == 1
    root = form["check_form"](model / "junit.xml")
    kind, message, _ = form["outcome"](root, f"enginesmith.compile.{ENGINE}", "output output")
    assert (kind, message.startswith("relative_l2 is ")) == ("failure", True)
    refused = enginesmith("validate", model / "absent", "--junit", model / "junit.xml")
    assert refused.code == 2
    assert form["outcome"](form["check_form"](model / "junit.xml"), "enginesmith.validate", "finished")[0] == "error"


def test_the_assertion_takes_the_compiled_module(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).train()
    bundle = es.compile(net, tmp_path / "out", inputs=["input:2x4"], targets=["onnxruntime-cpu"], benchmark=False)
    net.train()
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    assert assert_engine_close(bundle, net, inputs={"input": x})["output"].passed
    assert net.training
    with torch.no_grad():
        net[2].weight *= 1.2
    with pytest.raises(AssertionError, match=r"output +DIFFERS .* sample 0, \[\d, 1\]: expected "):
        assert_engine_close(bundle, net, inputs={"input": x})
