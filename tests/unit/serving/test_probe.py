from __future__ import annotations

import numpy as np
import pytest

from enginesmith.serving.probe import SLACK, difference, limit_of

Y = np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 6)


def record(worst: float | None, tolerance: float = 1e-4) -> dict[str, object]:
    outputs = [{"relative_l2": worst}]
    return {"validation": {"outputs": outputs, "tolerance": {"relative_l2": tolerance}}}


def test_a_right_answer_has_no_difference():
    assert difference({"y": Y}, {"y": Y + 1e-7}, 1e-4) == ""


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        (None, "output 'y' is missing"),
        (Y[:, :0], r"output 'y' has shape (2, 0), not (2, 6)"),
        (Y * 0, "output 'y' is 1.0 (relative L2) from the reference"),
        (Y * 1.01, "at most 0.0001 was expected"),
        (Y[::-1], "(relative L2) from the reference"),
        (np.where(Y > 0.9, np.nan, Y), "with 1 NaN and 0 Inf"),
        (np.where(Y > 0.9, np.inf, Y), "with 0 NaN and 1 Inf"),
    ],
)
def test_a_wrong_answer_says_what_is_wrong(output, problem):
    assert problem in difference({"y": Y}, {"y": output}, 1e-4)


def test_integers_need_the_shape_only():
    classes = np.array([1, 2])
    assert difference({"class": classes}, {"class": classes + 1}, 0.0) == ""
    assert "has shape" in difference({"class": classes}, {"class": classes[:1]}, 0.0)


@pytest.mark.parametrize(
    ("worst", "limit"), [(1e-6, 1e-4), (0.02, SLACK * 0.02), (None, 1e-4)], ids=["tolerance", "measured", "equal"]
)
def test_the_limit_is_what_validation_found(worst, limit):
    assert limit_of(record(worst)) == limit


def test_an_engine_that_was_never_judged_has_no_limit():
    assert limit_of({"validation": None}) == float("inf")
