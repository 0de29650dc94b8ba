"""The parts of the report that show a search: the ladder, the trade-off, batch sizes and the roofline."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from enginesmith.compiler.console.ladder import show_ladder
from enginesmith.compiler.ladder.trials import new_step
from enginesmith.compiler.report import plots, render, waterfall

example = runpy.run_path(str(Path(__file__).with_name("manifest_example.py")))["example"]
HOSTILE = "<script>alert(1)</script>"


def gain(ratio: float, against: str = "a") -> Any:
    return {"against": against, "ratio": ratio, "low": ratio * 0.9, "high": ratio * 1.1}


def step(rung: str, what: str, status: str, ratio: float | None = None, **fields: Any) -> Any:
    made: Any = new_step("cpu", rung, what, f"cpu-{what}", status, fields.pop("reason", ""))
    return {**made, "ratio": gain(ratio) if ratio else None, "p50_ms": 1.0, "relative_l2": 1e-3, **fields}


def ladder(*steps: Any, **fields: Any) -> Any:
    return {
        "objective": "latency",
        "effort": "default",
        "time_limit_s": 1200.0,
        "seconds": 61.0,
        "complete": True,
        "picks": {"cpu": "cpu-int8"},
        "steps": [step("captured graph", "cpu", "start"), *steps],
        **fields,
    }


STEPS = (
    step("simplify", "simplify", "kept", 1.25),
    step("precision", "fp16", "reverted", 0.8, reason="0.80 times the speed, which has to lie above 1.02"),
    step("quantization", "int8", "kept", 2.0),
    step("quantization", "int8-dynamic", "reverted", 1.5),
    step("mixed precision", "mixed", "skipped", reason="no time: the limit is reached", p50_ms=None, relative_l2=None),
)


def test_each_step_starts_where_the_engine_it_was_raced_against_stands() -> None:
    chart = waterfall.waterfall(ladder(*STEPS)["steps"])
    assert chart is not None
    assert [bar.value for bar in chart.bars] == ["1×", "1.25×", "0.80×", "2.00×", "1.50×"]  # noqa: RUF001
    start, simplified, half, int8, dynamic = chart.bars
    assert [bar.tone for bar in chart.bars] == ["baseline", "best", "wrong", "best", "wrong"]
    assert simplified.start == start.width
    assert half.start + half.width == pytest.approx(simplified.start + simplified.width, abs=0.1)
    assert int8.start == dynamic.start == pytest.approx(simplified.start + simplified.width, abs=0.1)
    assert max(bar.high or 0 for bar in chart.bars) <= 98.1


def test_the_sentence_of_a_target() -> None:
    steps = ladder(*STEPS)["steps"]
    text = "cpu: cpu-int8, 2.50× the captured graph; 2 of 4 steps kept"  # noqa: RUF001
    assert waterfall.sentence("cpu", steps, "cpu-int8") == text
    failed = [step("captured graph", "cpu", "failed", reason="no kernels")]
    assert waterfall.sentence("cpu", failed, None) == "cpu: no engine; no kernels"


def test_without_a_race_there_is_no_waterfall() -> None:
    assert waterfall.waterfall(ladder()["steps"]) is None


def test_the_pareto_front_has_what_nothing_beats_in_both() -> None:
    manifest = {**example(), "benchmark": None, "engines": []}
    timed = [("slow", 4.0, 1e-7), ("fast", 1.0, 1e-2), ("beaten", 5.0, 1e-3), ("middle", 2.0, 1e-4)]
    steps = [step("x", name, "reverted", p50_ms=p50, relative_l2=l2) for name, p50, l2 in timed]
    found = {p.name: p.pareto for p in plots.trade_off({**manifest, "ladder": {**ladder(), "steps": steps}})}
    assert found == {"cpu-fast": True, "cpu-middle": True, "cpu-slow": True, "cpu-beaten": False}


def test_faster_points_stand_left_and_better_ones_below() -> None:
    made = [plots.Point("a", 1.0, 1e-2, kept=True), plots.Point("b", 10.0, 0.0, kept=False)]
    plot = plots.trade_off_plot(made, budget=1e-1)
    a, b = plot.marks
    assert a.x < b.x
    assert a.y < b.y
    assert [line.kind for line in plot.lines] == ["limit"]
    assert plot.lines[0].y1 < a.y


def batches(**fields: Any) -> Any:
    points = [
        {
            "batch": 2**i,
            "fits": i < 5,
            "reason": "out of memory" if i == 5 else "",
            "p50_ms": 1.0 + i if i < 5 else None,
            "p99_ms": 2.0 + i if i < 5 else None,
            "samples_per_s": 100.0 * (i + 1) if i < 5 else None,
            "memory_bytes": None,
        }
        for i in range(6)
    ]
    return {
        "engine": "cpu-int8", "axis": "batch", "points": points, "largest": 16, "largest_is_limit": False,
        "saturation": 16, "best": 4, "p99_limit_ms": 4.5, **fields,
    }  # fmt: skip


def test_batch_plots_mark_the_best_and_draw_the_limit() -> None:
    throughput, p99 = plots.batch_plots(batches())
    assert [mark.kind for mark in throughput.marks] == ["point", "point", "pick", "point", "front"]
    assert [line.kind for line in p99.lines].count("limit") == 1
    heights = [mark.y for mark in throughput.marks]
    assert heights == sorted(heights, reverse=True)
    assert plots.batch_plots(batches(points=batches()["points"][:1])) == ()


def roofline(**fields: Any) -> Any:
    nodes = [
        {"name": "big", "operator": "Conv", "flops": 1e9, "bytes": 1e6, "ms": 5.0, "share": 0.8, "bound": "compute"},
        {"name": "small", "operator": "Add", "flops": 1e5, "bytes": 1e6, "ms": 1.0, "share": 0.2, "bound": "bandwidth"},
        {"name": "copy", "operator": "Copy", "flops": 0.0, "bytes": 1e6, "ms": 0.1, "share": 0.0, "bound": "transfer"},
    ]
    return {
        "engine": "cpu-int8", "device": "CPU", "precision": "int8", "peak_gflops": 400.0, "bandwidth_gb_s": 20.0,
        "launch_us": 1.0, "total_ms": 6.1, "nodes": nodes,
        "actions": [{"action": "--align 8", "node": "big", "saves_ms": 0.7, "why": HOSTILE, "found": ""}], **fields,
    }  # fmt: skip


def test_a_roofline_meets_its_ceilings_at_the_ridge() -> None:
    plot = plots.roofline_plot(roofline())
    assert plot is not None
    slope, flat = plot.lines
    assert (slope.x2, slope.y2) == (flat.x1, flat.y1)
    assert flat.y1 == flat.y2 < slope.y1
    assert [mark.label for mark in plot.marks] == ["1", "2"]
    assert plot.marks[0].radius > plot.marks[1].radius
    assert plots.roofline_plot(roofline(nodes=[])) is None
    assert plots.roofline_plot(roofline(peak_gflops=math.nan)) is None


def test_all_of_it_is_on_the_page_and_hostile_names_are_text() -> None:
    hostile = step("quantization", HOSTILE, "kept", 2.0)
    manifest = {
        **example(),
        "ladder": ladder(*STEPS, hostile, complete=False),
        "batches": [batches(engine=HOSTILE)],
        "roofline": roofline(engine=HOSTILE),
    }
    html = render(manifest)
    assert HOSTILE not in html
    for place in ("search", "trade-off", "batch-size", "roofline"):
        assert f'<h2 id="{place}">' in html
        assert f'<a href="#{place}">' in html
    assert "The time limit of 20 min 0 s left steps untried" in " ".join(html.split())
    assert "no time: the limit is reached" in html


def test_numbers_that_are_missing_or_not_finite_break_nothing() -> None:
    odd = [
        step("precision", "fp16", "reverted", math.inf),
        step("quantization", "int8", "kept", 2.0, p50_ms=math.nan, relative_l2=math.nan),
        step("options", "threads=2", "not measured"),
    ]
    html = render({**example(), "ladder": ladder(*odd), "batches": [], "roofline": None})
    assert "not measured" in html
    assert '<h2 id="roofline">' not in html


def test_the_terminal_tells_the_same() -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show_ladder(console, ladder(*STEPS, complete=False))
    text = console.export_text()
    assert "2.00 [1.80, 2.20]" in text
    assert "cpu: cpu-int8, 2.50× the captured graph; 2 of 4 steps kept" in text  # noqa: RUF001
    assert "give a higher --time-limit" in text
