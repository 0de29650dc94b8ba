"""The command `compare`: what it takes, shows and writes, and how it ends."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from enginesmith.cli import main
from enginesmith.compiler.comparison.rules import Rules
from enginesmith.compiler.console.comparison import rules_of, show_comparison

TESTS = Path(__file__).parents[3]
small = runpy.run_path(str(TESTS / "small_bundles.py"))
form = runpy.run_path(str(TESTS / "junit_form.py"))
QUICK = ["--rounds", "6", "--slice-s", "0.01", "--sizes", "batch=8"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bundles, named by what is wrong with them."""
    folder = tmp_path_factory.mktemp("bundles")
    for name in ("right", "scaled", "slow"):
        small["write_bundle"](folder / name, {"engine": "" if name == "right" else name})
    return folder


@pytest.fixture
def enginesmith(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bundles: Path) -> Run:
    """Runs the command line in this process, among the bundles."""
    monkeypatch.chdir(bundles)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["enginesmith", *map(str, arguments)])
        with pytest.raises(SystemExit, match=r"^\d+$") as ended:
            main()
        out, err = capsys.readouterr()
        return int(str(ended.value.code)), out, err

    return run


def lines(out: str) -> list[str]:
    return [" ".join(line.split()) for line in out.splitlines()]


def test_a_regression_in_speed_ends_with_1_and_says_where(enginesmith: Run, tmp_path: Path) -> None:
    code, out, err = enginesmith("compare", "right", "slow", *QUICK, "--junit", tmp_path / "junit.xml")
    assert code == 1, err
    shown = lines(out)
    assert shown[0] == "engine target precision MB compiled from"
    assert shown[1].startswith("A engine onnxruntime-cpu fp32 0.00 2026-11-27T12:00:00 right")
    assert any(line.startswith("batch=8 ") and line.endswith(" slower") for line in shown)
    assert any(line.startswith("regressed: speed, batch=8: slower: 0.") for line in shown)
    assert shown[-1] == "verdict: FAIL B is slower; equal results"
    root = form["check_form"](tmp_path / "junit.xml")
    kind, message, output = form["outcome"](root, "enginesmith.compare.speed", "batch=8")
    assert (kind, message) == ("failure", "B is slower")
    assert "\nhigh: 0." in output
    assert form["outcome"](root, "enginesmith.compare.accuracy", "left")[0] == "passed"


def test_what_does_not_count_is_shown_and_ends_with_0(enginesmith: Run, tmp_path: Path) -> None:
    arguments = ["compare", "right", "slow", *QUICK, "--fail-on", "accuracy", "--junit", tmp_path / "junit.xml"]
    code, out, _ = enginesmith(*arguments)
    assert code == 0
    assert lines(out)[-1] == "verdict: PASS B is slower; equal results"
    root = form["check_form"](tmp_path / "junit.xml")
    kind, _, output = form["outcome"](root, "enginesmith.compare.speed", "batch=8")
    assert kind == "passed"
    assert "counts: no, as this kind does not fail the comparison" in output


def test_a_regression_in_results_as_json(enginesmith: Run) -> None:
    code, out, _ = enginesmith("compare", "right", "scaled", "--no-benchmark", "--json")
    found = json.loads(out)
    assert code == 1
    assert found["verdict"]["accuracy"] == "worse"
    assert [found["a"]["path"], found["b"]["path"]] == ["right", "scaled"]
    assert enginesmith("compare", "right#engine", "right/engines/engine", "--no-benchmark", "-q")[:2] == (0, "")


def test_tolerances_of_the_command_line(enginesmith: Run) -> None:
    loose = ["--tolerance", "fp32.relative_l2=0.3", "--tolerance", "fp32.max_abs=0.3"]
    assert enginesmith("compare", "right", "scaled", "--no-benchmark", *loose)[0] == 0
    strict = [*loose, "--tolerance-accuracy", "0.1"]
    code, out, _ = enginesmith("compare", "right", "scaled", "--no-benchmark", *strict)
    assert code == 1
    assert "0.2 more than A, 0.1 allowed" in out
    code, out, _ = enginesmith("compare", "right", "slow", "--no-benchmark", "--max-growth", "0.1")
    assert (code, "growth, size of the engine: larger" in out) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["right", "absent"], 2, "'absent' is neither a bundle nor an engine"),
        (["right"], 2, "Missing argument 'B'"),
        (["right", "right#wrong"], 2, "unknown engine 'wrong'"),
        (["right", "right", "--fail-on", "sped"], 2, "unknown kind of regression 'sped'"),
        (["right", "right", "--tolerance-speed", "0.5"], 2, "tolerance of speed is no ratio"),
        (["right", "right", "--sizes", "batch"], 2, "sizes 'batch' cannot be read"),
        (["right", "right", "--sizes", "batch=9"], 2, "A does not take batch=9"),
        (["right", "right", "--rounds", "2"], 2, "field 'rounds' of the call is not valid"),
        (["right", "right", "--data", "absent.npz"], 2, "data 'absent.npz' does not exist"),
        (
            ["right", "right", "--junit", "right/manifest.json/x.xml"],
            2,
            "JUnit file 'right/manifest.json/x.xml' cannot",
        ),
    ],
)
def test_mistakes_end_with_their_code(enginesmith: Run, arguments: list[str], code: int, message: str) -> None:
    found, out, err = enginesmith("compare", *arguments)
    assert (found, out) == (code, "")
    assert message in err


def test_an_error_is_in_the_junit_file(enginesmith: Run, tmp_path: Path) -> None:
    assert enginesmith("compare", "right", "absent", "--junit", tmp_path / "junit.xml")[0] == 2
    root = form["check_form"](tmp_path / "junit.xml")
    assert form["outcome"](root, "enginesmith.compare", "finished")[0] == "error"


def values(**changes: Any) -> dict[str, Any]:
    options = {"tolerance_speed": 1.02, "tolerance_accuracy": None, "tolerance_metric": 0.0, "max_growth": None}
    return {**options, "fail_on": (), **changes}


def test_options_become_rules() -> None:
    assert rules_of(values()) == Rules()
    assert rules_of(values(fail_on=("none",))).fail_on == ()
    assert rules_of(values(fail_on=("speed,results", "growth"))).fail_on == ("speed", "results", "growth")


def test_notes_and_what_was_not_measured_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    side = {
        "path": "a[b]", "engine": "e", "target": "t", "precision": "fp32", "created": "", "fingerprint": "",
        "size_bytes": 10, "gpu_memory_bytes": None,
    }  # fmt: skip
    check = {
        "kind": "speed", "name": "batch=4", "verdict": "fails", "state": "failed",
        "text": "B was not timed: [no] kernel", "numbers": {"a_p50_ms": 1.0}, "seconds": 0.0,
    }  # fmt: skip
    verdict = {"passed": False, "text": "B fails where A runs", "reasons": ["speed"]}
    results = {"samples": 2, "inputs": "x.npz"}
    show_comparison(
        {"a": side, "b": side, "checks": [check], "results": results, "notes": ["A [itself]"], "verdict": verdict}  # type: ignore[typeddict-item]
    )
    shown = lines(capsys.readouterr().out)
    assert "batch=4 1 - - - - fails" in shown
    assert "speed, batch=4: B was not timed: [no] kernel" in shown
    assert "compared on 2 samples: x.npz" in shown
    assert "note: A [itself]" in shown
