"""Where things stand in the drawings."""

from __future__ import annotations

import itertools
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginesmith.compiler.report import figures
from enginesmith.compiler.report.choices import Choice, Choices, choices
from enginesmith.compiler.report.figures import plot as plots
from enginesmith.compiler.report.search import climbs

FOLDER = Path(__file__).parent
example = runpy.run_path(str(FOLDER.parent / "manifest_example.py"))["example"]
made = runpy.run_path(str(FOLDER / "searches_example.py"))
searched, ladder, step, point, CPU = (made[name] for name in ("searched", "ladder", "step", "point", "CPU"))
POSITIVE = st.floats(1e-12, 1e12)


@given(st.lists(POSITIVE, min_size=1, max_size=8), st.sampled_from([2, 10]))
def test_logarithmic_axes_hold_all_values_and_have_few_ticks(values: list[float], base: int) -> None:
    axis = figures.logarithmic(values, 0.0, 100.0, figures.short, base=base)
    places = [axis.place(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(0 < place < 100 for place in places)
    assert 1 <= len(axis.ticks) <= 9
    assert all(0 <= tick.at <= 100 for tick in axis.ticks)
    assert len({tick.label for tick in axis.ticks}) == len(axis.ticks)


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=8))
def test_linear_axes_begin_at_zero(values: list[float]) -> None:
    axis = figures.linear(values, 200.0, 10.0, figures.short)
    assert axis.place(0.0) == 200.0
    assert axis.ticks[0] == figures.Tick(200.0, "0")
    assert 2 <= len(axis.ticks) <= 7
    assert all(10 <= axis.place(value) <= 200 for value in values)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (1.0, 5.1, ["1", "1.5", "2", "3", "4", "5"]),
        (0.9, 1.2, ["0.9", "1", "1.1", "1.2"]),
        (1e-7, 0.05, ["1e-7", "1e-6", "1e-5", "1e-4", "0.001", "0.01", "0.1"]),
        (3.0, 200_000.0, ["10", "100", "1000", "10k", "100k"]),
    ],
)
def test_ticks_are_round(low: float, high: float, labels: list[str]) -> None:
    axis = figures.logarithmic([low, high], 0.0, 100.0, figures.short)
    assert [tick.label for tick in axis.ticks] == labels


def test_ticks_of_batch_sizes_are_powers_of_two() -> None:
    axis = figures.logarithmic([1, 48], 0.0, 100.0, figures.short, base=2)
    assert [tick.label for tick in axis.ticks] == ["1", "2", "4", "8", "16", "32"]
    gaps = [after.at - before.at for before, after in itertools.pairwise(axis.ticks)]
    assert gaps == pytest.approx([gaps[0]] * 5, abs=0.02)


def overlaps(marks: tuple[plots.Mark, ...]) -> list[tuple[str, str]]:
    """Pairs of labels, or a label and a mark, that cover each other at any width from a phone's to the page's."""
    found = []
    for width in range(270, 1011, 20):
        boxes = [(mark.number, plots._label_box(mark, mark.label, width)) for mark in marks if mark.label]
        found += [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if plots._overlap(one, other)]
        found += [(a, m.title) for a, box in boxes for m in marks if plots._overlap(box, plots._mark_box(m, width))]
    return found


def test_numbers_cover_neither_marks_nor_each_other_at_any_width() -> None:
    manifest = {**searched(example()), "ladder": made["long_ladder"]()}
    chart = figures.trade_off_plot(choices(manifest))
    assert chart
    assert len(chart.marks) == 44
    assert all(mark.label for mark in chart.marks)
    assert overlaps(chart.marks) == []


def test_what_finds_no_room_has_no_number() -> None:
    crowd = [plots.Mark(50.0, 100.0, "circle", "plain", size=5.0, number=str(index)) for index in range(90)]
    marks = figures.labelled(crowd, (), 200)
    assert overlaps(marks) == []
    assert marks[0].label == plots.Label("0", 10.5, 0.0, leader=False)
    assert 10 < sum(mark.label is not None for mark in marks) < 90


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "diamond", "cross"])
def test_outlines_are_paths_without_infinities(shape: Any) -> None:
    assert set(figures.outline(shape, 5.0)) <= set("MmLHVaz,-. 0123456789")


def falls(**values: Any) -> figures.Waterfall:
    chart = figures.waterfall(climbs(ladder(**values))[0], "latency")
    assert chart
    return chart


def test_each_step_of_the_waterfall_begins_where_the_one_that_was_kept_ends() -> None:
    rows = {row.what or row.label: row for row in falls().rows}
    int8, pruned, tuned, total = (
        rows[name] for name in ("int8 quantize-static", "prune:macs=0.75", "threads=1", f"{CPU}-int8-tuned")
    )
    assert int8.leads_to == pruned.before == tuned.before == pytest.approx(int8.start + (int8.width or 0), abs=0.02)
    assert (int8.kind, pruned.kind, tuned.kind, total.kind) == ("kept", "missing", "kept", "total")
    assert pruned.width is None
    assert rows["int8-dynamic"].kind == "reverted"
    assert rows["int8-dynamic"].before == rows["int8-dynamic"].leads_to == int8.before
    assert rows["int8-dynamic"].start < int8.before
    assert "2:4" not in rows
    assert total.start == falls().one
    assert total.start + (total.width or 0) == pytest.approx(rows["execution=parallel"].leads_to, abs=0.02)


def test_equal_gains_are_equally_long_wherever_they_stand() -> None:
    steps = [step("captured graph", CPU, "0", "start")]
    steps += [step(f"rung {i}", "", f"{i + 1}", "kept", 1.5, against=f"{i}") for i in range(5)]
    chart = figures.waterfall(climbs(ladder(*steps, picks={CPU: "5"}))[0], "latency")
    assert chart
    widths = [row.width for row in chart.rows if row.kind == "kept"]
    assert widths == pytest.approx([widths[0]] * 5, abs=0.02)
    assert chart.rows[-1].width == pytest.approx(5 * (widths[0] or 0), abs=0.05)


def test_a_step_that_is_far_slower_is_cut_off() -> None:
    chart = figures.waterfall(climbs(made["long_ladder"]())[0], "latency")
    assert chart
    cut = [row for row in chart.rows if row.cut]
    assert {row.value for row in cut} == {"0.12×"}  # noqa: RUF001
    assert all(row.start == 0 and row.low is None for row in cut)
    for row in chart.rows:
        assert 0 <= row.start <= row.start + (row.width or 0) <= 100
        assert all(0 <= end <= 100 for end in (row.low, row.high) if end is not None)


def test_what_was_not_measured_is_marked_and_moves_nothing() -> None:
    steps = [
        step("captured graph", CPU, "a", "start"),
        step("alignment", "align", "b", "not measured"),
        step("threads", "2", "c", "kept", 2.0),
    ]
    chart = figures.waterfall(climbs(ladder(*steps, picks={CPU: "c"}))[0], "latency")
    assert chart
    aligned = chart.rows[1]
    assert (aligned.kind, aligned.width, aligned.note) == ("unmeasured", None, "kept, not measured")
    assert aligned.leads_to == chart.one
    assert chart.rows[-1].note == "all steps that were measured and kept"


def test_without_a_race_there_is_no_waterfall() -> None:
    assert figures.waterfall(climbs(ladder())[1], "latency") is None


def trade_off(*points: tuple[float, float], **values: Any) -> figures.Plot:
    timed = [
        Choice(f"{n}", p50_ms, error, "on the front", front=True, number=n)
        for n, (p50_ms, error) in enumerate(points, 1)
    ]
    known: Any = {"untimed": (), "where": "", "budget": "", "bound": None, "baseline": "torch", "baseline_ms": None}
    chart = figures.trade_off_plot(Choices(tuple(timed), **{**known, **values}))
    assert chart
    return chart


def test_faster_points_stand_further_left_and_closer_ones_lower() -> None:
    chart = trade_off((1.0, 1e-2), (10.0, 1e-5), (20.0, 0.0), bound=0.1, budget="relative_l2=0.1", baseline_ms=40.0)
    fast, close, exact = chart.marks
    assert fast.x < close.x < exact.x
    assert fast.y < close.y < exact.y < chart.height
    limit = next(line for line in chart.lines if line.kind == "limit")
    assert limit.y1 == limit.y2 < fast.y
    guide = next(line for line in chart.lines if line.kind == "guide")
    assert guide.x1 == guide.x2 > exact.x
    assert [entry.text for entry in chart.legend if entry.shape is None] == ["budget, relative_l2=0.1"]


def test_the_stair_goes_right_and_then_down() -> None:
    chart = trade_off((1.0, 1e-2), (10.0, 1e-5))
    a, b = chart.marks
    stair = [(line.x1, line.y1, line.x2, line.y2) for line in chart.lines]
    assert stair == [
        (a.x, 0.0, a.x, a.y),
        (a.x, a.y, b.x, a.y),
        (b.x, a.y, b.x, b.y),
        (b.x, b.y, 100.0, b.y),
    ]


def test_equal_points_and_points_without_error_can_be_drawn() -> None:
    assert len(trade_off((1.0, 0.0), (1.0, 0.0)).marks) == 2
    assert figures.trade_off_plot(choices({**example(), "engines": [], "benchmark": None})) is None


def test_batch_sizes_that_were_found_are_marked() -> None:
    rate, tail = figures.batch_plots(made["batch_curve"]())
    shapes = {mark.title.partition(":")[0]: (mark.shape, mark.kind) for mark in rate.marks}
    assert shapes["batch 8"] == ("diamond", "pick")
    assert shapes["batch 16"] == ("square", "front")
    assert shapes["batch 96"] == ("triangle", "front")
    assert shapes["batch 2"] == ("circle", "plain")
    crosses = [mark.title for mark in rate.marks if mark.shape == "cross"]
    assert crosses == ["batch 128 does not run: out of memory: 4.1 GB were asked for, 3.6 GB were free"]
    assert [note.text for note in rate.notes] == ["best", "saturation", "largest"]
    assert [line.kind for line in tail.lines].count("limit") == 1
    assert [line.kind for line in rate.lines].count("limit") == 0
    limit = next(line.y1 for line in tail.lines if line.kind == "limit")
    below = {mark.title.partition(":")[0] for mark in tail.marks if mark.y > limit}
    assert below == {"batch 1", "batch 2", "batch 4", "batch 8"}
    assert {mark.x for mark in tail.marks} < {mark.x for mark in rate.marks}


def test_sizes_that_coincide_share_a_name() -> None:
    curve = {**made["batch_curve"](), "best": 96, "saturation": 96, "p99_limit_ms": None}
    rate, tail = figures.batch_plots(curve)
    assert [note.text for note in rate.notes] == ["best, saturation, largest"]
    assert tail.legend == ()


def test_fewer_than_two_timed_sizes_are_not_drawn() -> None:
    curve = made["batch_curve"]()
    assert (
        figures.batch_plots({**curve, "points": [point(1, 100.0, 9.0), point(2, math.nan, 9.0), point(4, None, None)]})
        == ()
    )


def test_the_ceilings_meet_at_the_ridge() -> None:
    chart = figures.roofline_plot(made["roofline"]())
    assert chart
    slope, flat = (line for line in chart.lines if line.kind == "ceiling")
    assert (slope.x2, slope.y2) == (flat.x1, flat.y1)
    assert flat.y1 == flat.y2 < slope.y1
    assert flat.x2 == 100
    gemm = next(mark for mark in chart.marks if "/fc/Gemm" in mark.title)
    share = (gemm.x - slope.x1) / (slope.x2 - slope.x1)
    assert gemm.y > slope.y1 + share * (slope.y2 - slope.y1)


def test_nodes_are_as_large_as_their_share_and_shaped_by_their_bound() -> None:
    chart = figures.roofline_plot(made["roofline"]())
    assert chart
    sizes = [mark.size for mark in chart.marks]
    assert sizes == sorted(sizes, reverse=True)
    assert {(mark.kind, mark.shape) for mark in chart.marks} == {
        ("compute", "circle"),
        ("bandwidth", "square"),
        ("launch", "triangle"),
        ("cpu-placed", "diamond"),
    }
    assert [mark.number for mark in chart.marks] == ["1", "2", "3", "4", "5", "7", "8", ""]
    assert overlaps(chart.marks) == []


@pytest.mark.parametrize("broken", [{"peak_gflops": math.nan}, {"bandwidth_gb_s": 0.0}, {"nodes": []}])
def test_without_ceilings_or_nodes_there_is_no_roofline(broken: dict[str, Any]) -> None:
    assert figures.roofline_plot({**made["roofline"](), **broken}) is None
