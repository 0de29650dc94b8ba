import numpy as np
import pytest

from enginesmith.compiler.benchmark.intervals import speed_up, student_quantile


@pytest.mark.parametrize(("degrees", "expected"), [(4, 2.776), (9, 2.262), (29, 2.045)])
def test_student_quantile_matches_the_table(degrees, expected):
    assert student_quantile(degrees) == pytest.approx(expected, rel=5e-3)


def test_ratio_and_interval_of_noiseless_rounds_are_exact():
    result = speed_up("torch", [4.0, 6.0, 8.0], [2.0, 3.0, 4.0], seed=0)
    assert result == {"against": "torch", "ratio": pytest.approx(2), "low": pytest.approx(2), "high": pytest.approx(2)}


def test_drift_that_both_share_cancels():
    drift = np.linspace(1, 3, 10)
    result = speed_up("torch", list(6 * drift), list(2 * drift), seed=0)
    assert (result["low"], result["high"]) == (pytest.approx(3), pytest.approx(3))


def test_inverse_of_the_ratio_is_the_ratio_of_the_inverse():
    noise = np.random.default_rng(1)
    a, b = noise.lognormal(1, 0.1, 8).tolist(), noise.lognormal(0, 0.1, 8).tolist()
    forward, backward = speed_up("b", b, a, seed=0), speed_up("a", a, b, seed=0)
    assert forward["ratio"] == pytest.approx(1 / backward["ratio"])


def test_one_spoilt_round_does_not_move_the_ratio():
    assert speed_up("torch", [2.0] * 10, [1.0] * 9 + [50.0], seed=0)["ratio"] == pytest.approx(2)


@pytest.mark.parametrize("true_ratio", [1.0, 1.3])
@pytest.mark.parametrize("rounds", [6, 10])
def test_interval_covers_the_truth_at_its_level_and_not_always(true_ratio, rounds):
    noise = np.random.default_rng(7)
    trials = 300
    covered = 0
    for _ in range(trials):
        weather = noise.lognormal(0, 0.3, rounds)
        baseline = true_ratio * weather * noise.lognormal(0, 0.05, rounds)
        result = speed_up("torch", baseline.tolist(), (weather * noise.lognormal(0, 0.05, rounds)).tolist(), seed=0)
        covered += result["low"] <= true_ratio <= result["high"]
        assert result["high"] / result["low"] < 1.5
    assert 0.92 * trials <= covered < trials
