"""Where memory ends: doubling, bisection, and what is timed together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginesmith.compiler.batch.largest import RESOLUTION, Probe, doubling, find_largest, groups, largest, worth_timing


def memory_of(limit: int) -> tuple[Callable[[int], Probe], list[int]]:
    """A machine on which batches beyond `limit` do not fit, and the sizes that were tried, in turn."""
    tried: list[int] = []

    def probe(batch: int) -> Probe:
        tried.append(batch)
        return Probe(batch, batch <= limit, "" if batch <= limit else "out of memory", 1.0, 100 + batch)

    return probe, tried


def test_sizes_are_doubled_to_the_limit() -> None:
    assert doubling(1, 64, 8, 64) == [1, 2, 4, 8, 16, 32, 64]
    assert doubling(3, 100, 12, 50) == [3, 4, 8, 12, 16, 32, 50, 64, 100]
    assert doubling(1, 6, 8, 64) == [1, 2, 4, 6]


def test_all_sizes_fit() -> None:
    probe, tried = memory_of(10**9)
    probes = find_largest(probe, doubling(1, 48))
    assert tried == [1, 2, 4, 8, 16, 32, 48]
    assert largest(probes) == 48


def test_it_is_bisected_after_the_first_that_fails() -> None:
    probe, tried = memory_of(20)
    probes = find_largest(probe, doubling(1, 1024))
    assert tried == [1, 2, 4, 8, 16, 32, 24, 20, 22, 21]
    assert largest(probes) == 20
    assert probes[32].reason == "out of memory"


def test_not_even_the_smallest_fits() -> None:
    probe, tried = memory_of(0)
    assert largest(find_largest(probe, doubling(1, 64))) == 0
    assert tried == [1]
    assert worth_timing(find_largest(probe, [1]), [1]) == []


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_what_is_found_is_near_the_truth_and_took_few_probes(truth: int, limit: int) -> None:
    probe, tried = memory_of(truth)
    found = largest(find_largest(probe, doubling(1, limit)))
    assert found <= min(truth, limit)
    assert min(truth, limit) - found < max(1, found // RESOLUTION + 1)
    assert len(tried) == len(set(tried)) <= 2 + limit.bit_length() + RESOLUTION.bit_length()


def test_the_steps_of_the_bisection_are_not_timed_but_its_end_is() -> None:
    probe, _ = memory_of(20)
    sizes = doubling(1, 1024)
    assert worth_timing(find_largest(probe, sizes), sizes) == [1, 2, 4, 8, 16, 20]


@pytest.mark.parametrize(
    ("room", "found"),
    [
        (1000, [[1, 2, 4, 8, 16]]),
        (26, [[1, 2, 4, 8, 16]]),
        (25, [[1, 2, 4, 8], [16]]),
        (8, [[1, 2, 4], [8], [16]]),
        (0, [[1], [2], [4], [8], [16]]),
    ],
)
def test_sizes_that_do_not_fit_together_are_timed_apart(room: int, found: list[list[int]]) -> None:
    probe, _ = memory_of(16)
    sizes = doubling(1, 16)
    probes = find_largest(probe, sizes)
    assert groups(sizes, probes, room) == found


def test_a_size_between_is_taken_to_need_what_the_next_larger_does() -> None:
    probe, _ = memory_of(16)
    probes = find_largest(probe, doubling(1, 16))
    assert groups([9, 10, 16], probes, 30) == [[9, 10], [16]]
