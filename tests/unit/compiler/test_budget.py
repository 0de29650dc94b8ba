from __future__ import annotations

import math

import numpy as np
import pytest

from enginesmith.compiler.budget import Budget, Meter
from enginesmith.errors import RecipeError, UnknownNameError

SCORES = np.float32([[1, 2, 3], [3, 2, 1], [1, 3, 2], [9, 1, 2]])
FLIPPED = np.float32([[1, 2, 3], [3, 2, 1], [1, 3, 2], [1, 9, 2]])


def meter(text: str, reference: np.ndarray, *found: np.ndarray, metric=None) -> Meter:
    budget = Budget.parse(text)
    result = Meter(Budget(budget.kind, budget.bound, metric))
    for array in found:
        result.add({"y": reference}, {"y": array}, {"label": np.zeros(len(reference), np.int64)})
    return result


@pytest.mark.parametrize("text", ["relative_l2=0.01", "top1=0.995", "metric=0.003", "snr_db=30"])
def test_text_is_read_and_written(text):
    assert str(Budget.parse(f" {text.replace('=', ' = ')}")) == text


@pytest.mark.parametrize(
    "text", ["relative_l2", "top1=most", "relative_l2=nan", "relative_l2=-1", "top1=99", "cosine=2"]
)
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(RecipeError, match="cannot be"):
        Budget.parse(text)


def test_unknown_measure_is_refused():
    with pytest.raises(UnknownNameError, match="unknown budget 'top2'"):
        Budget.parse("top2=1")


def test_default_is_half_of_what_validation_allows():
    assert [Budget.default(p).bound for p in ("fp16", "bf16", "int8")] == [0.0025, 0.02, 0.075]


def test_worst_sample_decides_and_error_is_the_mean():
    measured = meter("relative_l2=0.1", SCORES, SCORES, SCORES * 1.2)
    assert measured.value == pytest.approx(0.2)
    assert measured.error == pytest.approx(0.2 / math.sqrt(2))
    assert not measured.holds
    assert meter("relative_l2=0.21", SCORES, SCORES * 1.2).holds


def test_at_least_bounds():
    measured = meter("snr_db=13", SCORES, SCORES, SCORES * 1.2)
    assert measured.value == pytest.approx(13.979, abs=1e-3)
    assert measured.holds
    assert meter("cosine=1", SCORES, SCORES).value == pytest.approx(1)
    assert meter("snr_db=13", SCORES, SCORES).value == math.inf


def test_agreement_counts_rows_over_samples():
    measured = meter("top1=0.8", SCORES, SCORES, FLIPPED)
    assert measured.value == 7 / 8
    assert measured.holds
    assert not meter("top1=0.9", SCORES, SCORES, FLIPPED).holds
    assert meter("top5=1", SCORES, FLIPPED).value == 1  # three classes


def test_agreement_of_integers():
    classes = np.array([1, 2, 3, 4])
    assert meter("top1=0.7", classes, np.array([1, 2, 3, 5])).value == 0.75
    assert not meter("relative_l2=9", classes, np.array([1, 2, 3, 5])).holds


def test_agreement_needs_scores():
    with pytest.raises(RecipeError, match="needs class scores"):
        _ = meter("top1=0.9", np.ones((2, 3, 4), np.float32), np.ones((2, 3, 4), np.float32)).value


def test_metric_may_fall_by_the_bound():
    def accuracy(outputs, inputs):
        return outputs["y"].argmax(axis=1) == inputs["label"]

    measured = meter("metric=0.3", FLIPPED, SCORES, metric=accuracy)
    assert measured.value == -0.25  # better than the reference
    assert measured.holds
    assert meter("metric=0.3", SCORES, FLIPPED, metric=accuracy).value == 0.25
    assert not meter("metric=0.2", SCORES, FLIPPED, metric=accuracy).holds


def test_metric_is_needed_and_finite():
    with pytest.raises(RecipeError, match="on the metric, and there is none"):
        meter("metric=0.1", SCORES)
    with pytest.raises(RecipeError, match="not finite on the reference"):
        _ = meter("metric=0.1", SCORES, SCORES, metric=lambda outputs, inputs: np.nan).value


def test_nan_breaks_every_budget():
    for text in ("relative_l2=1e9", "top1=0", "metric=1e9"):
        measured = meter(text, SCORES, np.full_like(SCORES, np.nan), SCORES, metric=lambda outputs, inputs: 1.0)
        assert measured.error == math.inf
        assert not measured.holds
        assert "NaN or Inf where the reference has none" in measured.broken
