import numpy as np
import pytest

from enginesmith.compiler.generation.choice import Choice
from enginesmith.compiler.generation.sampling import Sampling, options_of

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32))


def test_what_is_left_out_is_never_drawn():
    assert Sampling(top_k=2).probabilities(LOGITS) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0])
    assert Sampling(top_p=0.6).probabilities(LOGITS) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0])
    assert Sampling(top_p=0.75).probabilities(LOGITS) == pytest.approx([0, 8 / 17, 0, 6 / 17, 3 / 17])
    generator = np.random.default_rng(0)
    drawn = {Sampling(top_k=2).draw(LOGITS, generator) for _ in range(200)}
    assert drawn == {1, 3}


def test_the_likeliest_token_stays_whatever_its_probability():
    assert Sampling(top_p=1e-9).probabilities(LOGITS).tolist() == [0, 1, 0, 0, 0]
    assert Sampling(top_k=1).probabilities(LOGITS).tolist() == [0, 1, 0, 0, 0]


def test_options_that_leave_nothing_out_change_nothing():
    assert Sampling(top_k=99, top_p=1.0).probabilities(LOGITS) == pytest.approx([0.1, 0.4, 0.05, 0.3, 0.15])


def test_top_p_counts_what_top_k_leaves():
    both = Sampling(top_k=3, top_p=0.5).probabilities(LOGITS)
    assert both == pytest.approx([0, 4 / 7, 0, 3 / 7, 0])  # 0.4 / 0.85 is less than a half


def test_a_temperature_sharpens_and_flattens():
    assert Sampling(temperature=0.5).probabilities(LOGITS)[1] > 0.5
    assert Sampling(temperature=100.0).probabilities(LOGITS) == pytest.approx([0.2] * 5, abs=0.01)


def test_tokens_come_as_often_as_they_are_likely():
    generator = np.random.default_rng(0)
    counts = np.bincount([Sampling().draw(LOGITS, generator) for _ in range(4000)], minlength=5)
    assert counts / 4000 == pytest.approx([0.1, 0.4, 0.05, 0.3, 0.15], abs=0.03)


def test_logits_of_minus_infinity_are_never_drawn():
    masked = np.array([-np.inf, 1.0, -np.inf], np.float32)
    generator = np.random.default_rng(0)
    assert {Sampling(temperature=5.0).draw(masked, generator) for _ in range(50)} == {1}


def test_options_of_rows_stand_side_by_side():
    rows = [Sampling(0.5), None, Sampling(2.0, 3, 0.9), Sampling(top_k=99, top_p=1)]
    assert {name: array.tolist() for name, array in options_of(rows, 10).items()} == {
        "temperature": [0.5, 1.0, 2.0, 1.0],
        "top_k": [10, 1, 3, 10],
        "top_p": [2.0, 2.0, 0.9, 2.0],
    }
    assert [row.limited for row in rows if row] == [False, True, True]


def test_a_row_draws_by_the_numbers_of_its_seed_one_at_a_time_or_together():
    one, together, host = (Choice(Sampling(), 4) for _ in range(3))
    logits = np.log(np.full(1000, 1e-3))
    chances = [one.chance() for _ in range(5)]
    assert chances == together.draws(5).tolist()
    assert [host(logits) for _ in range(5)] == [int(chance * 1000) for chance in chances]
    assert Choice(None).chance() == 0
