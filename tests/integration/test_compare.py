"""A compile, and everything that a release pipeline does with its bundle."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from enginesmith.testing import assert_engine_close

form = runpy.run_path(str(Path(__file__).parents[1] / "junit_form.py"))
FP32, FP16 = "onnxruntime-cpu-fp32", "onnxruntime-cpu-fp16"


def test_a_bundle_is_compiled_validated_compared_and_tested(enginesmith, model, arguments):
    junit, out = model / "junit.xml", model / "out"
    assert enginesmith(*arguments, "--precision", "fp32,fp16", "--junit", junit).code == 0
    root = form["check_form"](junit)
    assert form["outcome"](root, f"enginesmith.compile.{FP32}", "build")[0] == "passed"
    assert form["outcome"](root, f"enginesmith.compile.{FP16}", "output output")[0] == "passed"

    assert enginesmith("validate", out, "--junit", junit, "-q").code == 0
    assert (
        "samples: 4" in form["outcome"](form["check_form"](junit), f"enginesmith.validate.{FP32}", "output output")[2]
    )
    assert enginesmith("validate", out, "--tolerance", "fp16.relative_l2=1e-9", "--junit", junit, "-q").code == 1
    kind, message, _ = form["outcome"](form["check_form"](junit), f"enginesmith.validate.{FP16}", "output output")
    assert (kind, message.startswith("relative_l2 is ")) == ("failure", True)
    assert enginesmith("validate", model / "absent", "--junit", junit).code == 2
    assert form["outcome"](form["check_form"](junit), "enginesmith.validate", "finished")[0] == "error"

    both = ["compare", f"{out}#{FP32}", f"{out}#{FP16}", "--no-benchmark", "--json"]
    outcome = enginesmith(*both)
    found = json.loads(outcome.out)
    assert (outcome.code, found["same_model"], found["verdict"]["results"]) == (0, True, "equal")
    errors = {side: found["results"][side]["outputs"][0]["relative_l2"] for side in "ab"}
    assert errors["a"] < 1e-5 < errors["b"]
    assert enginesmith(*both, "--tolerance-accuracy", errors["b"] / 2).code == 1
    quick = ["--rounds", 6, "--slice-s", 0.01, "--sizes", "batch=4", "--tolerance-speed", 1000]
    assert enginesmith("compare", out, out, *quick, "--junit", junit, "-q").code == 0
    assert form["outcome"](form["check_form"](junit), "enginesmith.compare.speed", "batch=4")[0] == "passed"

    net = runpy.run_path(str(model / "model.py"))["net"]().train()
    x = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    assert assert_engine_close(out, net, inputs={"x": x})["output"].passed
    assert net.training
    with torch.no_grad():
        net.head.weight *= 1.2
    with pytest.raises(AssertionError, match=r"output +DIFFERS .* sample 0, \[\d, \d\]: expected "):
        assert_engine_close(out, net, inputs={"x": x})
