"""Decisions on curves: saturation, best batch, and what to measure between."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from enginesmith.compiler.batch.choice import best, best_within, missed, refinements, saturation

made = runpy.run_path(str(Path(__file__).with_name("points.py")))
point, curve = made["point"], made["curve"]

RISING = [point(1, 1.0), point(2, 1.2), point(4, 1.6), point(8, 3.1), point(16, 6.2)]
"""1000, 1667, 2500, 2581, 2581 samples a second."""

FALLING = [point(1, 1.0), point(2, 1.0), point(4, 4.0), point(8, 16.0)]
"""1000, 2000, 1000, 500: the caches overflow."""


def test_throughput_that_rises_saturates_where_it_has_95_percent() -> None:
    assert saturation(RISING) == 4
    assert best(RISING, None) in (8, 16)


def test_throughput_that_falls_again_saturates_at_its_peak() -> None:
    assert saturation(FALLING) == best(FALLING, None) == 2


def test_nothing_measured_decides_nothing() -> None:
    points = [point(1, None, fits=False, reason="out of memory")]
    assert (saturation(points), best(points, None), best(points, 5.0), refinements(points, 5.0)) == (None,) * 3 + ([],)


@pytest.mark.parametrize(("limit_ms", "found"), [(10.0, 16), (3.0, 4), (1.2, 2), (1.0, 1), (0.9, None)])
def test_the_best_keeps_the_limit(limit_ms: float, found: int | None) -> None:
    points = [*RISING[:-1], point(16, 6.1)]
    assert best(points, limit_ms) == found


def test_it_is_p99_that_counts_not_the_median() -> None:
    assert best([point(1, 1.0, 1.1), point(2, 1.2, 9.0)], 2.0) == 1


def test_a_size_without_times_is_never_the_best() -> None:
    assert best([point(1, 1.0), point(64, None, fits=False)], None) == 1


def test_sizes_are_measured_below_the_saturation_and_up_to_the_limit() -> None:
    points = [point(8, 4.0), point(16, 4.0), point(32, 6.0), point(64, 12.0)]  # 2000, 4000, 5333, 5333
    # Saturated at 32: sizes between 16 and 32. At 8 ms the best is 32, 64 misses: sizes between those two.
    assert refinements(points, 8.0) == [16, 20, 24, 28, 32, 40, 48, 56, 64]
    assert refinements(points, None) == [16, 20, 24, 28, 32]


def test_neighbours_leave_nothing_to_measure() -> None:
    assert refinements([point(1, 1.0), point(2, 1.0), point(3, 9.0)], 2.0) == []


def test_what_is_compared_is_measured_again() -> None:
    points = [point(4, 4.0), point(8, 4.0), point(16, 7.9), point(32, 15.6)]  # 1000, 2000, 2025, 2051
    assert refinements(points, None) == [4, 5, 6, 7, 8, 32]


def test_a_limit_is_missed_where_no_engine_keeps_it() -> None:
    slow, fast = curve([point(1, 7.3)], p99_limit_ms=5.0), curve([point(1, 3.0)], p99_limit_ms=5.0, best=1)
    assert missed([slow]) == "cpu-fp32: no batch size keeps a p99 of 5 ms, the smallest, 1, takes 7.3 ms"
    assert missed([slow, fast]) == ""
    assert missed([curve([point(1, 7.3)], best=1)]) == ""
    assert missed([]) == ""


def test_an_engine_that_could_not_be_timed_keeps_no_limit() -> None:
    assert missed([curve([point(1, None)], p99_limit_ms=5.0)]).endswith(
        "no batch size keeps a p99 of 5 ms: none could be timed"
    )


def test_a_deployed_engine_takes_no_more_than_its_axis_holds() -> None:
    searched = curve(RISING, p99_limit_ms=4.0)
    assert (best_within(searched, None), best_within(searched, 4)) == (8, 4)
