from __future__ import annotations

import dataclasses
import math

import pytest

from enginesmith.compiler.quantization.tuning import Trial, settle


@dataclasses.dataclass(frozen=True)
class Options:
    method: str | None = None
    correction: bool | None = None
    other: int = 0


CHOICES = {"method": ("a", "b"), "correction": (True, False)}


def errors(**found: float):
    return lambda options: found[f"{options.method}{int(options.correction)}"]


def test_the_combination_with_the_least_error_is_kept() -> None:
    best, trials = settle(Options(), CHOICES, errors(a1=0.1, a0=0.2, b1=math.inf, b0=0.01))
    assert best == Options("b", correction=False)
    assert trials == (
        Trial("method=a,correction=true", pytest.approx(20.0), kept=False),
        Trial("method=a,correction=false", pytest.approx(13.98, abs=0.01), kept=False),
        Trial("method=b,correction=true", None, kept=False),
        Trial("method=b,correction=false", pytest.approx(40.0), kept=True),
    )


@pytest.mark.parametrize(("error", "kept"), [(0.099, "a"), (0.096, "b"), (math.inf, "a")])
def test_the_first_one_stays_where_the_gain_may_be_chance(error: float, kept: str) -> None:
    best, _ = settle(Options(correction=True), CHOICES, errors(a1=0.1, b1=error))
    assert best == Options(kept, correction=True)


def test_what_the_user_chose_is_not_tried() -> None:
    def never(options: Options) -> float:
        raise AssertionError("nothing to measure")

    given = Options("b", correction=False, other=3)
    assert settle(given, CHOICES, never) == (given, ())


def test_no_difference_at_all_has_no_ratio() -> None:
    best, trials = settle(Options("a"), CHOICES, lambda options: 0.0)
    assert best.correction is True
    assert [trial.snr_db for trial in trials] == [None, None]
