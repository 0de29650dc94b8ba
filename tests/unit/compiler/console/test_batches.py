"""What the command line shows of the batch search."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from enginesmith.compiler.bundle import Bundle
from enginesmith.compiler.console.batches import show_curves
from enginesmith.compiler.console.console import show_bundle

FOLDER = Path(__file__).parents[1]
made = runpy.run_path(str(FOLDER / "batch" / "points.py"))
example = runpy.run_path(str(FOLDER / "manifest_example.py"))["example"]
point, curve = made["point"], made["curve"]


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Any:
    def shown(*curves: Any) -> list[str]:
        show_curves(curves)
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    return shown


POINTS = [
    point(1, 1.0, 1.5),
    point(8, 2.0, 3.0),
    point(64, 15.0, 20.0, calls=40),
    point(80, None, fits=False, reason="out of memory: [bad_alloc]"),
]


def test_a_curve_with_its_decisions(shown: Any) -> None:
    lines = shown(curve(POINTS, sizes={"length": 128}, saturation=64, best=8, p99_limit_ms=5.0))
    assert lines == [
        "cpu-fp32, batch, length=128 on cpu",
        "batch fits p50 ms p99 ms calls samples/s GPU % memory MB",
        "1 yes 1 1.5 250 1000.0 - 80",
        "8 yes 2 3 250 4000.0 - 80 best",
        "64 yes 15 20 40 4266.7 - 80 largest, saturation",
        "80 no - - - - - 80",
        "cpu-fp32: largest batch 64",
        "cpu-fp32: throughput saturates at batch 64, with 4267 samples/s",
        "cpu-fp32: most throughput within a p99 of 5 ms at batch 8: 4000 samples/s, p99 3 ms",
        "batch 80: out of memory: [bad_alloc]",
        "interleaved",
    ]


def test_a_p99_over_few_calls_says_so(shown: Any) -> None:
    lines = shown(curve(POINTS[:-1], largest_is_limit=True, saturation=64, best=64))
    assert "cpu-fp32: largest batch 64, and no larger one was asked for" in lines
    assert lines[-2] == (
        "cpu-fp32: most throughput at batch 64: 4267 samples/s, p99 20 ms "
        "(p99 over 40 calls only, of 200 that it needs)"
    )


def test_a_limit_that_is_missed_and_an_engine_that_does_not_run(shown: Any) -> None:
    lines = shown(curve(POINTS, saturation=64, p99_limit_ms=1.0), curve(POINTS[3:], engine="other", p99_limit_ms=1.0))
    assert "cpu-fp32: no batch size keeps a p99 of 1 ms, the smallest, 1, takes 1.5 ms" in lines
    assert "other: no batch size that was searched runs" in lines
    assert lines.count("interleaved") == 1


def test_a_bundle_shows_the_decisions(capsys: pytest.CaptureFixture[str]) -> None:
    show_bundle(Bundle(Path("out"), {**example(), "batches": [curve(POINTS, saturation=64, best=8, p99_limit_ms=5.0)]}))
    assert "cpu-fp32: most throughput within a p99 of 5 ms at batch 8" in capsys.readouterr().out
