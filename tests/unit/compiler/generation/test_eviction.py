from __future__ import annotations

import numpy as np
import pytest

from enginesmith.compiler.generation.eviction import Eviction
from enginesmith.errors import RecipeError, UnknownNameError


def test_a_window_keeps_the_first_and_the_newest():
    assert Eviction("window", sinks=2).order(10, 6, None).tolist() == [[0, 1, 6, 7, 8, 9]]
    assert Eviction("window", sinks=0).order(10, 3, None).tolist() == [[7, 8, 9]]


def test_importance_keeps_what_got_most_of_each_head_in_its_order():
    got = np.array([[9, 0, 5, 1, 5, 7, 0, 9, 0, 0], [0, 3, 0, 2, 0, 1, 0, 0, 0, 0]], np.float32)
    order = Eviction("importance", sinks=1, recent=0.4).order(10, 6, got)
    assert order.tolist() == [[0, 2, 5, 7, 8, 9], [0, 1, 3, 5, 8, 9]]


def test_equal_importance_keeps_the_older():
    assert Eviction("importance", sinks=0).order(6, 4, np.zeros((1, 6))).tolist() == [[0, 1, 4, 5]]


def test_a_part_is_dropped_and_at_least_one():
    assert Eviction().kept(32) == 24
    assert Eviction(share=0.01).kept(32) == 31


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policy": "importence"}, UnknownNameError, "unknown policy of eviction 'importence'"),
        ({"sinks": -1}, RecipeError, "sinks of eviction are out of range"),
        ({"recent": 1.0}, RecipeError, "recent of eviction is out of range"),
        ({"share": 0}, RecipeError, "share of eviction is out of range"),
    ],
)
def test_what_cannot_be_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        Eviction(**options)
