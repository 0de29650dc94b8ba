"""What two engines can be given."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from enginesmith.compiler.comparison.inputs import (
    Adapted,
    check_alike,
    common_sizes,
    opened_like,
    parse_sizes,
    samples,
    sized_inputs,
    takes,
)
from enginesmith.compiler.comparison.place import find
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.errors import DataError, RecipeError, UnknownNameError, UsageError

small = runpy.run_path(str(Path(__file__).parents[3] / "small_bundles.py"))
signature = small["signature"]


def static(rows: int) -> Signature:
    return Signature((TensorSpec("x", "float32", (rows, 4)),), signature().outputs)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (signature(names=("y", "left", "right")), r"A and B have different inputs(?s:.)*expected: x, as A\n.*y, as B"),
        (signature(names=("x", "left", "wrong")), "A and B have different outputs"),
        (signature(9, 9, 16), r"take no size of input 'x' in common(?s:.)*\(batch=1\.\.4\.\.8, 4\), as A"),
        (static(9), "take no size of input 'x' in common"),
        (Signature((TensorSpec("x", "int64", ("batch", 4)),), signature().outputs, signature().axes), "take different"),
        (Signature((TensorSpec("x", "float32", (4,)),), signature().outputs), "take different inputs 'x'"),
    ],
)
def test_engines_that_take_or_give_other_things_are_refused(other: Signature, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_alike(signature(), other)


@pytest.mark.parametrize(
    "other",
    [
        signature(8, 16, 64),
        static(8),
        Signature((TensorSpec("x", "float16", ("rows", 4)),), signature().outputs, {"rows": AxisRange(1, 2, 3)}),
    ],
)
def test_other_ranges_and_widths_are_no_difference(other: Signature) -> None:
    check_alike(signature(), other)


def test_sizes_are_those_of_either_that_both_take() -> None:
    assert common_sizes(signature(1, 4, 8), signature(1, 4, 8)) == [{"batch": 1}, {"batch": 4}, {"batch": 8}]
    assert common_sizes(signature(1, 4, 8), signature(2, 5, 64)) == [{"batch": size} for size in (2, 4, 5, 8)]
    assert common_sizes(signature(1, 4, 64), static(5)) == [{"batch": 5}]
    assert common_sizes(static(5), signature(1, 4, 64)) == [{}]
    renamed = Signature((TensorSpec("x", "float32", ("rows", 4)),), axes={"rows": AxisRange(8, 8, 32)})
    assert common_sizes(signature(1, 4, 8), renamed) == [{"batch": 8}]


def test_no_size_in_common_is_an_error() -> None:
    two = Signature((TensorSpec("x", "float32", ("a", "b")),), axes={"a": AxisRange(1, 1, 8), "b": AxisRange(1, 1, 8)})
    other = dataclasses.replace(two, axes={"a": AxisRange(1, 1, 8), "b": AxisRange(2, 2, 8)})
    assert common_sizes(two, other) == [{"a": 1, "b": 2}, {"a": 4, "b": 2}, {"a": 8, "b": 2}]
    gap = dataclasses.replace(two, axes={"a": AxisRange(1, 1, 2), "b": AxisRange(1, 1, 5)})
    off = dataclasses.replace(two, axes={"a": AxisRange(2, 3, 3), "b": AxisRange(5, 7, 7)})
    with pytest.raises(UsageError, match="take no size in common that either is measured at"):
        common_sizes(gap, off)


def test_sizes_that_are_asked_for_are_checked() -> None:
    assert common_sizes(signature(), signature(), [{"batch": 3}, {}]) == [{"batch": 3}, {"batch": 4}]
    with pytest.raises(UnknownNameError, match="unknown dynamic axis 'bath'"):
        common_sizes(signature(), signature(), [{"bath": 3}])
    with pytest.raises(UsageError, match=r"B does not take batch=1(?s:.)*batch=2"):
        common_sizes(signature(), signature(2, 2, 2), [{"batch": 1}])
    with pytest.raises(UsageError, match="A does not take batch=9"):
        common_sizes(signature(), signature(1, 1, 16), [{"batch": 9}])


def test_sizes_are_read_from_text() -> None:
    assert parse_sizes("batch=8") == {"batch": 8}
    assert parse_sizes("batch=8, dim1=128") == {"batch": 8, "dim1": 128}
    for text in ("batch", "batch=x", "=3", ""):
        with pytest.raises(RecipeError, match=r"sizes '.*' cannot be read"):
            parse_sizes(text)


def test_the_sample_is_brought_to_each_size_in_the_width_of_a() -> None:
    sample = {"x": np.arange(8, dtype=np.float64).reshape(2, 4)}
    made = sized_inputs(signature(), sample, [{"batch": 1}, {"batch": 3}])
    assert [one.batch for one in made] == [1, 3]
    assert made[1].arrays["x"].dtype == np.float32
    assert made[1].arrays["x"][2].tolist() == [0, 1, 2, 3]


def test_takes_adapts_floats_and_nothing_else() -> None:
    assert takes(signature(), {"x": np.zeros((1, 4), np.float16)})
    assert not takes(signature(), {"x": np.zeros((1, 4), np.int64)})
    assert not takes(signature(), {"x": np.zeros((9, 4), np.float32)})


def places(tmp_path: Path, a: Signature | None = None, b: Signature | None = None, *, alone: bool = False) -> Any:
    if alone:
        return [find(small["write_engine"](tmp_path / name, described=d)) for name, d in (("a", a), ("b", b))]
    return [find(small["write_bundle"](tmp_path / name, described=d)) for name, d in (("a", a), ("b", b))]


def test_samples_are_those_of_bs_record_or_of_as_where_these_do_not_fit(tmp_path: Path) -> None:
    a, b = places(tmp_path)
    found = samples(a, b, None, [], max_samples=2, seed=0)
    assert str(tmp_path / "b") in found.where
    assert not found.random
    assert [one.inputs["x"].shape for one in found] == [(4, 4)] * 2
    assert len(list(found)) == 2  # it can be read again


def test_samples_that_a_does_not_take_are_passed_over(tmp_path: Path) -> None:
    a, b = places(tmp_path, signature(1, 2, 4), signature(1, 8, 8))
    assert str(tmp_path / "a") in samples(a, b, None, [], max_samples=8, seed=0).where


def test_data_are_cut_for_both(tmp_path: Path) -> None:
    a, b = places(tmp_path, signature(1, 8, 8), signature(1, 2, 4))
    np.savez(tmp_path / "x.npz", x=np.zeros((8, 4), np.float32), label=np.arange(8))
    found = list(samples(a, b, str(tmp_path / "x.npz"), [], max_samples=3, seed=0))
    assert [(one.inputs["x"].shape, one.labels["label"].tolist()) for one in found] == [
        ((2, 4), [0, 1]),
        ((2, 4), [2, 3]),
        ((2, 4), [4, 5]),
    ]
    with pytest.raises(DataError, match="does not exist"):
        samples(a, b, "absent.npz", [], max_samples=3, seed=0)


def test_without_any_record_inputs_are_made_up(tmp_path: Path) -> None:
    a, b = places(tmp_path, signature(), signature(), alone=True)
    found = samples(a, b, None, [{"batch": 1}, {"batch": 4}], max_samples=8, seed=3)
    assert found.where == "random inputs (seed 3)"
    assert found.random
    assert [one.inputs["x"].shape for one in found] == [(1, 4), (4, 4)]


def test_no_sample_that_fits_both_is_an_error(tmp_path: Path) -> None:
    a, b = places(tmp_path, signature(1, 2, 4), signature(3, 8, 8))
    with pytest.raises(DataError, match=r"no sample of .* fits both A and B(?s:.)*give samples that do with --data"):
        samples(a, b, None, [], max_samples=8, seed=0)


def test_an_engine_of_another_width_is_adapted(tmp_path: Path) -> None:
    (place,) = [find(small["write_engine"](tmp_path / "plain"))]
    half = Signature((TensorSpec("x", "float16", ("batch", 4)),), signature().outputs, signature().axes)
    runner = opened_like(place, half)
    assert isinstance(runner, Adapted)
    x = small["samples"]()[0].astype(np.float16)
    bound = runner.bind({"x": x})
    bound.run()
    assert np.array_equal(bound.outputs()["left"], runner.run({"x": x})["left"])
    runner.reset()
    runner.close()
    same = opened_like(place, place.signature)
    assert not isinstance(same, Adapted)
    same.close()
