"""Rows become batches and batches shards: always the same ones, with bad rows found."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.errors import DataError, EngineError, UnknownNameError, UsageError
from enginesmith.offline.ahead import ahead
from enginesmith.offline.batches import Reader
from enginesmith.offline.infer import infer
from enginesmith.offline.layout import choose_outputs, layout_of, zeros
from enginesmith.offline.parts import MemoryPart
from enginesmith.offline.plan import pieces, survey, tasks
from enginesmith.offline.source import Source


def signature(low=1, opt=4, high=8, *, length=None, scale=False):
    inputs = [TensorSpec("x", "float32", ("batch", "length" if length else 2))]
    if scale:
        inputs.append(TensorSpec("scale", "float32", ()))
    axes = {"batch": AxisRange(low, opt, high)} | ({"length": length} if length else {})
    return Signature(tuple(inputs), (TensorSpec("y", "float32", ("batch", "?")),), axes)


def part(rows, start=0, name="p", width=2, **more):
    x = np.arange(start, start + rows, dtype=np.float32)[:, None].repeat(width, axis=1)
    return MemoryPart(name, {"x": x, **more})


class Double:
    def __init__(self):
        self.batches = []

    def run(self, inputs):
        self.batches.append(len(inputs["x"]))
        return {"y": inputs["x"] * 2 * inputs.get("scale", 1)}


def run(parts, layout, batch=4, shard_rows=8, bad="stop", hashed=False):
    engine = Double()
    reader = Reader(layout, batch, bad, hashed=hashed)
    return engine, list(infer(engine, reader.batches(pieces(parts, layout, shard_rows)), ["y"]))


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    batch=st.integers(1, 8),
    shard_rows=st.integers(1, 20),
    low=st.integers(1, 3),
)
def test_all_rows_come_out_in_order_whatever_the_sizes(sizes, batch, shard_rows, low):
    starts = np.cumsum([0, *sizes])
    parts = [part(size, start) for size, start in zip(sizes, starts, strict=False)]
    engine, shards = run(parts, layout_of(signature(low, 4, 8)), max(batch, low), shard_rows)
    y = np.concatenate([shard.arrays["y"] for shard in shards])
    np.testing.assert_array_equal(y[:, 0], np.arange(starts[-1]) * 2)
    assert [shard.number for shard in shards] == list(range(len(shards)))
    assert all(shard.rows == shard_rows for shard in shards[:-1])
    assert min(engine.batches) >= low


def test_batches_reach_over_files_but_not_over_shards():
    engine, shards = run([part(3), part(3, 3), part(5, 6)], layout_of(signature()))
    assert engine.batches == [4, 4, 3]
    assert [shard.rows for shard in shards] == [8, 3]


def test_a_shard_ends_where_the_shape_of_rows_changes():
    layout = layout_of(signature(length=AxisRange(1, 2, 4)))
    engine, shards = run([part(3), part(2, 3), part(2, 5, width=3), part(1, 7)], layout)
    assert [shard.arrays["y"].shape for shard in shards] == [(5, 2), (2, 3), (1, 2)]
    assert engine.batches == [4, 1, 2, 1]


def test_what_a_file_shares_stays_with_its_rows():
    parts = [part(3, name=str(n), scale=np.float32(n)) for n in (1, 5)]
    _, shards = run(parts, layout_of(signature(scale=True)))
    assert [shard.arrays["y"][:, 0].tolist() for shard in shards] == [[0, 2, 4], [0, 10, 20]]


def test_the_pieces_of_a_shard_are_the_same_for_all():
    layout = layout_of(signature())
    parts = [part(7), part(0), part(6, 7)]
    cut = [[(p.start, p.stop) for p in found] for _, found in tasks(pieces(parts, layout, 5))]
    assert cut == [[(0, 5)], [(5, 7), (0, 3)], [(3, 6)]]


def test_bad_rows_do_not_reach_the_engine():
    bad = part(6)
    bad._arrays["x"][[1, 2, 4], 0] = np.nan, np.nan, np.inf
    layout = layout_of(signature())
    with pytest.raises(DataError, match=r"p, row 1: input 'x' holds NaN or Inf"):
        run([bad], layout)
    _, (shard,) = run([bad], layout, bad="skip")
    assert np.isnan(shard.arrays["y"]).any(axis=1).tolist() == [False, True, True, False, True, False]
    assert [failure.to_json()["rows"] for failure in shard.failures] == [[1, 3], [4, 5]]
    _, (shard,) = run([bad], layout, bad="run")
    assert shard.failures == ()
    assert bad._arrays["x"][0, 0] == 0, "the data itself is not changed"


def test_a_shared_input_that_is_not_finite_fails_all_rows_of_its_file():
    layout = layout_of(signature(scale=True))
    parts = [part(2, name="a", scale=np.float32(np.nan)), part(2, name="b", scale=np.float32(1))]
    _, shards = run(parts, layout, bad="skip")
    assert [len(shard.failures) for shard in shards] == [1, 0]
    assert np.isnan(shards[0].arrays["y"]).all()


def test_a_part_that_does_not_fit_gives_rows_that_failed():
    layout = layout_of(signature())
    _, (shard,) = run([part(2), part(3, width=5, name="wide"), part(1)], layout, bad="skip")
    assert np.isnan(shard.arrays["y"]).all(axis=1).tolist() == [False, False, True, True, True, False]
    assert shard.failures[0].to_json()["file"] == "wide"
    assert "wrong shape" in shard.failures[0].reason
    with pytest.raises(DataError, match=r"wide: input 'x' has the wrong shape"):
        run([part(2), part(3, width=5, name="wide")], layout)


def test_the_digest_is_of_a_shards_inputs():
    layout = layout_of(signature())
    _, first = run([part(9)], layout, hashed=True)
    _, second = run([part(4), part(5, 4)], layout, hashed=True)
    _, other = run([part(8), part(1, 9)], layout, hashed=True)
    assert [shard.digest for shard in first] == [shard.digest for shard in second]
    assert first[0].digest == other[0].digest
    assert first[1].digest != other[1].digest


def test_an_output_that_is_not_one_result_a_row_is_refused():
    class Mean:
        def run(self, inputs):
            return {"y": inputs["x"].mean(axis=0)}

    reader = Reader(layout_of(signature()), 4, "stop")
    with pytest.raises(EngineError, match="output 'y' is not one result a row"):
        list(infer(Mean(), reader.batches(pieces([part(8)], layout_of(signature()), 8)), ["y"]))


def test_an_engine_that_fails_says_on_which_rows():
    class Broken:
        def run(self, inputs):
            raise EngineError("out of memory")

    reader = Reader(layout_of(signature()), 4, "stop")
    with pytest.raises(EngineError, match="shard 0, rows 0 to 4: out of memory"):
        list(infer(Broken(), reader.batches(pieces([part(8)], layout_of(signature()), 8)), ["y"]))


@pytest.mark.parametrize(
    ("arrays", "keep", "message"),
    [
        ({"y": np.zeros(3)}, (), r"p has no rows"),
        ({"x": np.zeros((3, 2))}, (), r"input 'x' has the wrong dtype"),
        ({"x": np.zeros((3, 2), "float32")}, ("id",), r"'id' is missing, which is to be kept"),
        ({"x": np.zeros((3, 2), "float32"), "id": np.zeros(4)}, ("id",), r"has other rows than the rest"),
    ],
)
def test_what_a_part_lacks(arrays, keep, message):
    layout = layout_of(signature(), keep=keep)
    source = Source("p", lambda: iter([MemoryPart("p", arrays)]), files=True, identity={})
    with pytest.raises(DataError, match=message):
        survey(source, layout, "skip")


def test_the_rows_of_all_files_are_counted():
    source = Source("p", lambda: iter([part(3), part(4)]), files=True, identity={})
    assert survey(source, layout_of(signature()), "stop") == 7
    with pytest.raises(DataError, match="p holds no rows"):
        survey(Source("p", lambda: iter([part(0)]), files=True, identity={}), layout_of(signature()), "stop")


def test_models_that_have_no_rows_are_refused():
    scalar = Signature((TensorSpec("x", "float32", ()),))
    with pytest.raises(UsageError, match="no input of the engine has an axis along which rows could stack"):
        layout_of(scalar)
    with pytest.raises(UsageError, match="'x' is an input and lies in the data already"):
        layout_of(signature(), keep=["x"])
    loss = Signature(signature().inputs, (TensorSpec("loss", "float32", ()),), signature().axes)
    with pytest.raises(UsageError, match="output 'loss' has no axis for rows"):
        choose_outputs(loss, ())
    with pytest.raises(UnknownNameError, match="unknown output 'z'"):
        choose_outputs(signature(), ["z"])


def test_a_batch_that_the_engine_does_not_take_is_refused():
    with pytest.raises(UsageError, match="the engine takes no batch of 9") as caught:
        layout_of(signature()).check_batch(9)
    assert caught.value.expected == "1 to 8"
    fixed = layout_of(Signature((TensorSpec("x", "float32", (4, 2)),)))
    with pytest.raises(UsageError, match="the engine takes no batch of 1") as caught:
        fixed.check_batch(1)
    assert caught.value.expected == 4
    assert zeros(fixed)["x"].shape == (4, 2)


def test_no_more_is_read_ahead_than_asked_for():
    read, go = [], threading.Semaphore(0)

    def items():
        for number in range(100):
            read.append(number)
            yield number
            go.release()

    with ahead(items(), 2) as found:
        assert next(found) == 0
        go.acquire(timeout=10)
        go.acquire(timeout=10)
        assert next(found) == 1
    assert len(read) <= 5


def test_what_fails_while_reading_ahead_is_raised_where_it_is_read():
    def items():
        yield 1
        raise DataError("gone")

    with ahead(items(), 2) as found:
        assert next(found) == 1
        with pytest.raises(DataError, match="gone"):
            next(found)
