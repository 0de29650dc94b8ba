"""Real engines on the stopwatch; the slow one takes a hundred times as long, so that no noise hides it."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from enginesmith.errors import RecipeError, UnknownNameError, UsageError
from enginesmith.testing import assert_not_slower

small = runpy.run_path(str(Path(__file__).parents[2] / "small_bundles.py"))
QUICK = {"rounds": 6, "slice_s": 0.01}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A quick and a slow engine."""
    folder = tmp_path_factory.mktemp("speed")
    return small["write_engine"](folder / "quick"), small["write_engine"](folder / "slow", "slow")


def test_a_slower_engine_fails_with_the_interval(engines: tuple[Path, Path]) -> None:
    quick, slow = engines
    with pytest.raises(
        AssertionError, match=r"slow is slower than .*quick at batch=8\n  batch=8: 0\.\d+ times as fast"
    ):
        assert_not_slower(slow, than=quick, sizes=[{"batch": 8}], **QUICK)


def test_a_faster_engine_passes_and_gives_the_ratios(engines: tuple[Path, Path], tmp_path: Path) -> None:
    quick, slow = engines
    np.savez(tmp_path / "x.npz", x=np.zeros((8, 4), np.float32))
    found = assert_not_slower(quick, than=slow, data=str(tmp_path / "x.npz"), **QUICK)
    assert list(found) == ["batch=1", "batch=4", "batch=8"]
    assert all(ratio["low"] > 1 for ratio in found.values())
    assert found["batch=1"]["against"] == str(slow)


def test_a_large_tolerance_lets_a_slower_one_pass(engines: tuple[Path, Path]) -> None:
    quick, slow = engines
    assert assert_not_slower(slow, than=quick, tolerance=1e9, sizes=[{"batch": 1}], **QUICK)["batch=1"]["high"] < 1


def test_what_cannot_be_measured_is_an_error_and_no_failure(engines: tuple[Path, Path], tmp_path: Path) -> None:
    quick, _ = engines
    with pytest.raises(UsageError, match="is neither a bundle nor an engine"):
        assert_not_slower(quick, than=tmp_path / "absent")
    with pytest.raises(UnknownNameError, match="unknown dynamic axis 'rows'"):
        assert_not_slower(quick, than=quick, sizes=[{"rows": 8}])
    with pytest.raises(RecipeError, match="tolerance of speed is no ratio"):
        assert_not_slower(quick, than=quick, tolerance=0.5)
    with pytest.raises(RecipeError, match="field 'rounds' of the call is not valid"):
        assert_not_slower(quick, than=quick, rounds=2)
