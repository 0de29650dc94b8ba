from __future__ import annotations

import itertools
import math
import random

import pytest

from enginesmith.serving.load.answers import RIGHT, WRONG, Answer, percentile, summarize
from enginesmith.serving.load.knee import keeps_up, knee, within
from enginesmith.serving.load.schedule import arrivals


def steady(rate: float, latency_s: float, seconds: float = 10.0) -> list[Answer]:
    return [Answer(n / rate, n / rate, n / rate + latency_s, RIGHT) for n in range(int(rate * seconds))]


def test_latency_counts_from_when_a_request_was_due_not_from_when_it_was_sent():
    stalled = [Answer(due=n * 0.01, sent=1.0, done=1.0 + 0.001 * n, outcome=RIGHT) for n in range(100)]
    found = summarize(stalled, 0.0, 2.0, 100.0)
    assert found.p(50.0) > 500
    assert found.late_ms == pytest.approx(990)


def test_warm_up_and_what_came_late_do_not_count_as_achieved():
    answers = steady(100, 0.05)
    found = summarize(answers, 2.0, 10.0, 100.0)
    assert found.answered == 800
    assert found.achieved == pytest.approx(100, abs=1)
    late = [Answer(a.due, a.sent, a.done + 20, RIGHT) for a in answers]
    assert summarize(late, 2.0, 10.0, 100.0).achieved == 0


def test_only_right_answers_have_latencies():
    answers = [*steady(10, 0.001), Answer(1, 1, 9, WRONG), Answer(1, 1, 9, "UNAVAILABLE"), Answer(2, 2, 9, WRONG)]
    found = summarize(answers, 0.0, 10.0, None)
    assert found.p(99.9) == pytest.approx(1.0)
    assert found.errors == {WRONG: 2, "UNAVAILABLE": 1}


def test_nothing_was_answered():
    found = summarize([Answer(0, 0, 1, "UNAVAILABLE")], 0.0, 2.0, 1.0)
    assert found.answered == 0
    assert math.isinf(found.p(99.0))
    assert not keeps_up(found)


@pytest.mark.parametrize(("percent", "expected"), [(50.0, 50), (90.0, 90), (99.0, 99)])
def test_a_percentile_is_the_value_of_its_rank(percent, expected):
    assert percentile(list(range(1, 101)), percent).ms == expected


def test_an_interval_covers_the_true_percentile_about_19_times_in_20():
    generator = random.Random(0)
    hits = 0
    for _ in range(400):
        found = percentile(sorted(generator.random() for _ in range(1000)), 90.0)
        hits += found.high is not None and found.low <= 0.9 <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_too_few_values_have_no_upper_bound():
    assert percentile([1.0, 2.0, 3.0], 99.0).high is None


def test_users_come_at_random_and_on_average_at_the_rate():
    due = list(itertools.takewhile(lambda at: at < 100, arrivals(50, seed=1)))
    assert len(due) == pytest.approx(5000, rel=0.05)
    gaps = [b - a for a, b in itertools.pairwise(due)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation == pytest.approx(mean, rel=0.1)  # of an exponential distribution
    assert due == list(itertools.takewhile(lambda at: at < 100, arrivals(50, seed=1)))


def test_constant_arrivals_are_evenly_spaced():
    assert list(itertools.islice(arrivals(4, 0, constant=True), 4)) == [0, 0.25, 0.5, 0.75]


def queue(rate: float, capacity: float) -> list[Answer]:
    """Of a queue with one server and random arrivals, mean latency 1 / (capacity - rate); beyond it never ends."""
    if rate >= capacity:
        return [Answer(n / rate, n / rate, n / capacity + 1, RIGHT) for n in range(int(rate * 10))]
    return steady(rate, 1 / (capacity - rate))


def test_the_knee_of_a_simple_queue_is_at_half_its_capacity():
    rates = [10, 20, 30, 40, 50, 60, 70, 80, 90, 120]
    curve = [summarize(queue(rate, 100), 0.0, 10.0, rate) for rate in rates]
    assert rates[knee(curve)] == 50
    assert not keeps_up(curve[-1])


def test_the_highest_rate_within_a_latency():
    rates = [10, 50, 80, 90, 120]
    curve = [summarize(queue(rate, 100), 0.0, 10.0, rate) for rate in rates]
    assert rates[within(curve, 55.0)] == 80
    assert within(curve, 1.0) is None


def test_a_service_that_never_keeps_up_has_no_knee():
    assert knee([summarize(queue(200, 100), 0.0, 10.0, 200)]) is None
