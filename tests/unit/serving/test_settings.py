from __future__ import annotations

import pytest

from enginesmith.errors import RecipeError
from enginesmith.serving.settings import Serving


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_batch": 0}, "max_batch is too small"),
        ({"queue_delay_us": -1}, "queue_delay_us is too small"),
        ({"max_queue": 0}, "max_queue is too small"),
        ({"priorities": -1}, "priorities is too small"),
        ({"instances": 0}, "instances is too small"),
        ({"timeout_ms": 0.0}, "timeout_ms is too small"),
        ({"preferred": (4, 4)}, "preferred cannot be served"),
        ({"preferred": (0,)}, "preferred cannot be served"),
        ({"gpus": (-1,)}, "gpus cannot be served"),
        ({"name": "a/b"}, "the model cannot have this name"),
        ({"name": ""}, "the model cannot have this name"),
        ({"name": ".."}, "the model cannot have this name"),
        ({"merge": False, "max_queue": 8}, "max_queue needs requests to be merged"),
        ({"merge": False, "preferred": (8,)}, "preferred needs requests to be merged"),
    ],
)
def test_values_that_make_no_sense(values, message):
    with pytest.raises(RecipeError, match=message):
        Serving(**values)


@pytest.mark.parametrize(
    ("values", "stalls"),
    [
        ({}, False),
        ({"queue_delay_us": 100}, False),
        ({"max_queue": 64}, True),
        ({"timeout_ms": 50.0}, True),
        ({"priorities": 2}, True),
        ({"max_queue": 64, "instances": 2}, False),
        ({"max_queue": 64, "gpus": (0, 1)}, False),
        ({"merge": False}, False),
    ],
)
def test_a_bounded_queue_before_one_instance_stalls(values, stalls):
    assert Serving(**values).stalls is stalls
