"""JUnit XML that pipelines read."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from enginesmith.compiler.console.junit import Case, bundle_cases, junit_report, validation_cases
from enginesmith.errors import BuildError, OutputError

example = runpy.run_path(str(Path(__file__).parents[1] / "manifest_example.py"))["example"]

form = runpy.run_path(str(Path(__file__).parents[3] / "junit_form.py"))
check_form, outcome = form["check_form"], form["outcome"]


def test_every_engine_of_a_bundle_and_every_output_is_a_case(tmp_path: Path) -> None:
    with junit_report(tmp_path / "deep" / "junit.xml", "compile") as report:
        report(bundle_cases(example()))
    root = check_form(tmp_path / "deep" / "junit.xml")
    assert outcome(root, "enginesmith.compile.onnxruntime-cpu-fp32", "build")[0] == "passed"
    kind, message, _ = outcome(root, "enginesmith.compile.tensorrt-fp16", "build")
    assert (kind, message.startswith("the TensorRT worker ended by signal 11")) == ("failure", True)
    assert outcome(root, "enginesmith.compile.onnxruntime-cuda-fp16", "build")[0] == "skipped"
    kind, message, output = outcome(root, "enginesmith.compile.onnxruntime-cpu-fp16", "output logits")
    assert kind == "failure"
    assert message
    assert re.search(r"^relative_l2: [\d.e-]+$", output, re.MULTILINE)
    assert re.search(r"^bound_relative_l2: [\d.e-]+$", output, re.MULTILINE)
    assert outcome(root, "enginesmith.compile.torchscript-fp32", "output logits")[0] == "passed"


def test_a_dropped_engine_is_skipped(tmp_path: Path) -> None:
    manifest = example()
    manifest["engines"][1]["dropped"] = "it is not faster"
    with junit_report(tmp_path / "junit.xml", "compile") as report:
        report(bundle_cases(manifest))
    root = check_form(tmp_path / "junit.xml")
    name = "enginesmith.compile.onnxruntime-cpu-fp16"
    assert outcome(root, name, "build")[:2] == ("skipped", "dropped: it is not faster")
    assert [case.attrib["name"] for case in root.iter("testcase") if case.attrib["classname"] == name] == ["build"]


def test_validations_are_cases_and_so_are_budgets(tmp_path: Path) -> None:
    validation = example()["engines"][0]["validation"]
    assert validation is not None
    validation["budget"] = {"text": "metric=0.003", "value": 0.02, "holds": False, "problem": ""}
    assert validation["metric"] is not None
    validation["metric"] |= {"perplexity": 44.12, "perplexity_of_reference": 44.1}
    with junit_report(tmp_path / "junit.xml", "validate") as report:
        report(validation_cases([validation]))
    root = check_form(tmp_path / "junit.xml")
    group = "enginesmith.validate.onnxruntime-cpu-fp32"
    assert outcome(root, group, "budget metric=0.003")[:2] == ("failure", "measured 0.02")
    found, _, output = outcome(root, group, "output logits")
    assert found == "passed"
    assert "perplexity: 44.12\nperplexity_of_reference: 44.1" in output
    assert next(root.iter("testsuite")).attrib["name"] == "enginesmith validate"


def test_an_error_is_a_case_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    path.write_text("of another run")
    with pytest.raises(BuildError, match="driver too old"), junit_report(path, "compile"):
        raise BuildError("driver too old", hint="update it")
    root = check_form(path)
    assert root.attrib["errors"] == "1"
    assert outcome(root, "enginesmith.compile", "finished")[:2] == ("error", "driver too old")
    assert "update it" in (root.findtext(".//error") or "")


def test_a_bug_leaves_no_file_of_another_run(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    path.write_text("of another run")
    with pytest.raises(ZeroDivisionError, match="by zero"), junit_report(path, "compile"):
        _ = 1 / 0
    assert not path.exists()


def test_text_that_xml_cannot_hold_is_cleaned(tmp_path: Path) -> None:
    case = Case("compare.speed", 'a<b>"&\x00', "failure", "\x1b[31mred\x1b[0m & <gone>", "line\nline\x07", {"k": None})
    with junit_report(tmp_path / "junit.xml", "compare") as report:
        report([case])
    root = check_form(tmp_path / "junit.xml")
    assert outcome(root, "enginesmith.compare.speed", 'a<b>"&') == ("failure", "[31mred[0m & <gone>", "k: unknown")
    assert root.findtext(".//failure") == "line\nline"


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "junit.xml", tmp_path):
        with pytest.raises(OutputError, match=r"JUnit file '.*' cannot be written"), junit_report(path, "compare"):
            raise AssertionError("the work began")


def test_nothing_is_written_where_nothing_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with junit_report(None, "compare") as report:
        report([])
    assert list(tmp_path.iterdir()) == []
