import pytest

from enginesmith.compiler.ladder.clock import Clock, in_words


@pytest.fixture
def now(monkeypatch):
    """A clock that the test sets."""
    time = [100.0]
    monkeypatch.setattr("enginesmith.compiler.ladder.clock.time.perf_counter", lambda: time[0])
    return time


@pytest.fixture
def shown():
    return []


def test_a_target_gets_its_part_of_the_time(now, shown):
    clock = Clock(60.0, lambda fraction, text: shown.append((fraction, text)))
    clock.allot(2)
    assert clock.left_s == 30
    now[0] += 10
    clock.allot(1)
    assert clock.left_s == 50


def test_the_bar_follows_what_steps_took(now, shown):
    clock = Clock(600.0, lambda fraction, text: shown.append((fraction, text)))
    clock.tell("first", 4)
    assert shown[-1] == (0.0, "first, at most 10 min left")
    now[0] += 20
    clock.note("quantization", 20.0)
    clock.tell("second", 3)
    assert shown[-1] == (0.25, "second, about 60 s left")
    clock.stages().update(0.9, "build")
    assert shown[-1] == (0.25, "second: build, about 60 s left")


def test_a_kind_of_step_costs_what_its_like_did(now, shown):
    clock = Clock(600.0, lambda fraction, text: None)
    assert clock.cost_s("precision") == 0
    clock.note("quantization", 30.0)
    clock.note("precision", 10.0)
    assert clock.cost_s("precision") == 10
    assert clock.cost_s("pruning") == 20


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0 s"), (89, "89 s"), (150, "2 min")])
def test_seconds_in_words(seconds, text):
    assert in_words(seconds) == text
