from __future__ import annotations

import pytest

from enginesmith.compiler.batch.latency import parse_latency
from enginesmith.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "ms"), [("5ms", 5), ("0.1s", 100), (" 2.5 MS ", 2.5), ("800us", 0.8), (".5s", 500), ("1.ms", 1)]
)
def test_latencies_are_read(text: str, ms: float) -> None:
    assert parse_latency(text) == pytest.approx(ms)


@pytest.mark.parametrize("text", ["", "5", "5 min", "0ms", "-1ms", "ms", "1e3ms", "5ms7"])
def test_what_is_no_latency_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"cannot be read\n  expected: 5ms, 0.1s or 800us"):
        parse_latency(text)
