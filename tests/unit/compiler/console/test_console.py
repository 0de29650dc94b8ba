"""What the command line shows of a bundle."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from enginesmith.compiler.bundle import Bundle
from enginesmith.compiler.console.console import (
    print_table,
    show_benchmark,
    show_bundle,
    show_diagnosis,
    show_validations,
)
from enginesmith.compiler.manifest import Manifest

example = runpy.run_path(str(Path(__file__).parents[1] / "manifest_example.py"))["example"]


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Any:
    """The lines that a bundle with this manifest shows, blanks between words as one."""

    def shown(manifest: Manifest) -> list[str]:
        show_bundle(Bundle(Path("out"), manifest))
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    return shown


def test_engines_with_error_times_and_speed_up(shown: Any) -> None:
    lines = shown(example())
    assert lines[0] == "engine verdict rel. L2 mean ms p50 ms p99 ms requests/s speed-up (95 %) MB"
    assert "torch-eager baseline - 1.32 1.28 1.8 783.0 - -" in lines
    assert "onnxruntime-cpu-fp32 pass 2.3e-07 0.386 0.375 0.529 2666.0 3.41 [3.29, 3.55] 0.8" in lines
    assert "tensorrt-rtx-fp16 built - - - - - - 0.8" in lines
    assert any(line.startswith("The speed-up is the median of the rounds' ratios") for line in lines)
    assert lines[-1] == "verdict: PASS report: out/report.html"


def test_perplexity_is_told_beside_its_metric(capsys: pytest.CaptureFixture[str]) -> None:
    validation = example()["engines"][0]["validation"]
    show_validations([validation])
    assert "reference 0.9861, 360 samples\n" in capsys.readouterr().out
    validation["metric"] |= {"perplexity": 44.1237, "perplexity_of_reference": 44.12}
    show_validations([validation])
    assert "reference 0.9861, 360 samples; perplexity 44.124, reference 44.120\n" in capsys.readouterr().out


def test_a_dropped_engine_is_no_failure(shown: Any) -> None:
    manifest = example()
    engine = next(engine for engine in manifest["engines"] if engine["name"] == "onnxruntime-cpu-fp16")
    assert any("onnxruntime-cpu-fp16, output" in line for line in shown(manifest))
    engine["dropped"] = "it is not faster"
    lines = shown(manifest)
    assert any(line.startswith("onnxruntime-cpu-fp16 dropped") for line in lines)
    assert not any("onnxruntime-cpu-fp16, output" in line for line in lines)


def test_a_narrow_terminal_gets_fewer_columns_rather_than_cut_ones(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=36)
    print_table(
        console, ["engine", ">mean ms", ">p50 ms"], [["onnxruntime-cpu-fp32-2", "1.23", "1.21"]], drop=["mean ms"]
    )
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["engine", "p50", "ms"],
        ["onnxruntime-cpu-fp32-2", "1.21"],
    ]


@pytest.mark.parametrize("verdict", [{"passed": False, "state": "failed"}, {"passed": True}, {}])
def test_a_verdict_that_is_not_plainly_good_is_a_failure(shown: Any, verdict: dict[str, Any]) -> None:
    assert shown({**example(), "verdict": verdict})[-1] == "verdict: FAIL report: out/report.html"


def test_engines_that_nothing_was_compared_with(shown: Any) -> None:
    lines = shown({**example(), "verdict": {"passed": True, "state": "unproven"}, "benchmark": None})
    assert lines[-2:] == [
        "Engines were built, but no engine ran on this machine, so none was compared with the reference.",
        "verdict: BUILT report: out/report.html",
    ]
    assert not any("speed-up is" in line for line in lines)


def test_reasons_stand_with_what_to_do(shown: Any) -> None:
    lines = shown(example())
    place = lines.index("onnxruntime-cuda-fp16: onnxruntime 1.32 here has no CUDAExecutionProvider")
    assert lines[place + 1] == "to do: pip uninstall onnxruntime, then pip install 'enginesmith[cuda]'"


def test_a_benchmark_says_how_its_speed_up_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    show_benchmark(example()["benchmark"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Intervals are bootstrapped over rounds. The speed-up is the median of the rounds' ratios" in text
    assert "torch-compile skipped: no C++ compiler was found" in text


def test_a_diagnosis_says_why_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    target = {"target": "tensorrt", "builds": False, "runs": False, "usable": None, "versions": {}}
    show_diagnosis({"machine": {}, "targets": [{**target, "reason": "no [GPU]", "to_do": "buy one"}]})
    assert "tensorrt: no [GPU]\n  to do: buy one\n" in capsys.readouterr().out
