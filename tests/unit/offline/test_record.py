"""What is written, what is decided, and what is told on the way."""

from __future__ import annotations

import json

import numpy as np
import pytest

from enginesmith.compiler.progress import Progress
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.errors import (
    DataError,
    EngineMismatchError,
    OutputError,
    StorageError,
    UnknownNameError,
    UsageError,
)
from enginesmith.offline.batches import Failure
from enginesmith.offline.choices import batch_of, engine_info, shard_rows_of
from enginesmith.offline.job import from_json, to_json
from enginesmith.offline.layout import layout_of
from enginesmith.offline.meter import Meter, duration, rate_text
from enginesmith.offline.record import Record
from enginesmith.offline.results import Outputs
from enginesmith.offline.shards import Shard, write_shard, writing
from enginesmith.offline.workers import on_cpu, on_gpus
from enginesmith.targets.base import EngineInfo

SETTINGS = {
    "bundle": {"sha256": "b"}, "engine": "e", "data": {"files": 1}, "batch": 4, "shard_rows": 8, "outputs": ["y"],
    "keep": [],
}  # fmt: skip


def shard(number, rows=8, value=1.0, **more):
    return Shard(number, rows, {"y": np.full((rows, 2), value, np.float32)}, **more)


def begun(folder, count=2):
    record = Record(folder, SETTINGS)
    record.begin()
    for number in range(count):
        record.add(write_shard(folder, shard(number)))
    return record


def test_the_same_outputs_are_the_same_bytes(tmp_path):
    first = write_shard(tmp_path, shard(3))
    again = write_shard(tmp_path, shard(3))
    assert first == again
    assert first["file"] == "shard-00000003.npz"


def test_an_output_may_have_any_name(tmp_path):
    arrays = {name: np.arange(3) for name in ("file", "a/b", "ä")}
    write_shard(tmp_path, Shard(0, 3, arrays))
    with np.load(tmp_path / "shard-00000000.npz") as found:
        assert set(found.files) == set(arrays)


def test_rows_that_gave_nan_are_counted_without_those_that_failed(tmp_path):
    y = np.zeros((6, 2), np.float32)
    y[[1, 2, 4], 0] = np.nan
    record = write_shard(tmp_path, Shard(0, 6, {"y": y}, (Failure("f", 11, 13, "bad"),)))
    assert record["nan_rows"] == 1
    assert record["failed"] == [{"file": "f", "rows": [11, 13], "reason": "bad"}]


def test_a_record_goes_on_where_it_was(tmp_path):
    begun(tmp_path)
    record = Record.read(tmp_path)
    assert record is not None
    assert (sorted(record.shards), record.complete, record.settings) == ([0, 1], False, SETTINGS)
    record.begin()
    record.add(write_shard(tmp_path, shard(2, rows=3)))
    record.finish()
    done = Record.read(tmp_path)
    assert done is not None
    assert done.complete
    assert [s["first_row"] for s in done.shards.values()] == [0, 8, 16]
    assert not (tmp_path / "shards.jsonl").exists()
    assert Outputs.open(tmp_path).rows == 19
    assert Outputs.open(tmp_path)["y"].shape == (19, 2)


def test_a_line_that_was_cut_off_does_not_count(tmp_path):
    begun(tmp_path)
    journal = tmp_path / "shards.jsonl"
    journal.write_text(journal.read_text()[:-20])
    record = Record.read(tmp_path)
    assert record is not None
    assert sorted(record.shards) == [0]
    record.begin()
    assert len(journal.read_text().splitlines()) == 1


def test_a_damaged_record_is_named(tmp_path):
    begun(tmp_path)
    (tmp_path / "shards.jsonl").write_text("nonsense\n")
    with pytest.raises(EngineMismatchError, match="is no record of a run that this version can go on with"):
        Record.read(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99, "kind": "outputs"}))
    with pytest.raises(EngineMismatchError, match="is no record of a run"):
        Record.read(tmp_path)


def test_a_run_that_is_not_finished_has_no_outputs(tmp_path):
    begun(tmp_path)
    with pytest.raises(OutputError, match="holds no finished run"):
        Outputs.open(tmp_path)


def finished(folder, *shards):
    record = Record(folder, SETTINGS)
    record.begin()
    for item in shards:
        record.add(write_shard(folder, item))
    record.finish()
    return Outputs.open(folder)


def test_an_output_of_all_rows_is_saved_as_one_array(tmp_path):
    (tmp_path / "out").mkdir()
    outputs = finished(tmp_path / "out", shard(0), shard(1, rows=3, value=2.0))
    outputs.save("y", tmp_path / "y.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), outputs["y"])
    with pytest.raises(UnknownNameError, match="unknown output 'z'"):
        outputs.save("z", tmp_path / "z.npy")
    (tmp_path / "other").mkdir()
    wide = Shard(1, 2, {"y": np.zeros((2, 5), np.float32)})
    with pytest.raises(DataError, match="rows of output 'y' differ"):
        finished(tmp_path / "other", shard(0), wide).save("y", tmp_path / "z.npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out", "y.npy"]


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_must_be_the_same(name, tmp_path):
    record = begun(tmp_path)
    record.check(SETTINGS)
    record.check({})
    with pytest.raises(UsageError, match=r"was begun with (an)?other"):
        record.check({**SETTINGS, name: "else"})


def test_errors_of_the_disk_say_which(tmp_path):
    with (
        pytest.raises(StorageError, match="no space left for shard 3 of '/o'; the shards before it are whole"),
        writing("/o", "shard 3"),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(OutputError, match="shard 3 of '/o' cannot be written"), writing("/o", "shard 3"):
        raise PermissionError(13, "Permission denied")
    with pytest.raises(StorageError, match="shard 3 of '/o' cannot be written"), writing("/o", "shard 3"):
        raise OSError(5, "Input/output error")


def layout(low=1, opt=4, high=64):
    return layout_of(Signature((TensorSpec("x", "float32", ("batch", 2)),), axes={"batch": AxisRange(low, opt, high)}))


def test_the_batch_is_what_is_given_or_the_best_or_the_usual():
    assert batch_of(layout(), 7, 32) == 7
    assert batch_of(layout(), None, 32) == 32
    assert batch_of(layout(), None, None) == 4
    assert batch_of(layout(), None, 128) == 4
    with pytest.raises(UsageError, match="the engine takes no batch of 65"):
        batch_of(layout(), 65, None)


def manifest(p50_ms=None):
    timings = [{"candidate": "e", "batch": 4, "p50_ms": p50_ms}] if p50_ms else []
    return {"benchmark": {"timings": timings}}


@pytest.mark.parametrize(
    ("p50_ms", "row_bytes", "total", "rows"),
    [
        (None, 8, None, 4096),  # so many batches, where no time is known
        (1000.0, 8, None, 40),  # ten seconds
        (1e6, 8, None, 4),  # one batch at least
        (0.001, 1 << 20, None, 64),  # 64 MiB
        (1.0, 8, 2_000_000, 31252),  # a part of all rows
        (1.0, 8, 1000, 4000),  # but a second's at least
        (None, 8, 1000, 64),
    ],
)
def test_a_shard_is_bounded_by_size_time_and_share(p50_ms, row_bytes, total, rows):
    assert shard_rows_of(manifest(p50_ms), "e", 4, {"y": row_bytes}, total, None) == rows


def test_the_rows_of_a_shard_may_be_given():
    assert shard_rows_of(manifest(), "e", 4, {"y": 8}, None, 7) == 7
    with pytest.raises(UsageError, match="a shard has one row at least"):
        shard_rows_of(manifest(), "e", 4, {"y": 8}, None, 0)


def test_an_engine_with_state_is_refused(tmp_path):
    folder = tmp_path / "engines" / "e"
    folder.mkdir(parents=True)
    signature = Signature((TensorSpec("x", "float32", ("batch", 2)),), axes={"batch": AxisRange(1, 4, 8)})
    EngineInfo("e", "onnxruntime-cpu", "fp32", "model.onnx", signature, stateful=True).write(folder)
    with pytest.raises(UsageError, match="engine e carries state from one call to the next"):
        engine_info(tmp_path, "e")
    with pytest.raises(EngineMismatchError, match=r"engine f of .* cannot be read"):
        engine_info(tmp_path, "f")


@pytest.mark.parametrize(
    "error", [DataError("m", expected=3, found="f", hint="h"), UnknownNameError("engine", "a", ["b"])]
)
def test_errors_travel_between_processes(error):
    found = from_json(json.loads(json.dumps(to_json(error))))
    assert type(found) is type(error)
    assert str(found) == str(error)


class Told(Progress):
    def __init__(self):
        self.told = []

    def update(self, fraction, what):
        self.told.append((round(fraction, 3), what))


def test_the_rate_is_of_the_last_minute_and_leaves_out_what_was_there():
    now, told = [0.0], Told()
    meter = Meter(told, 10_000, 4_000, clock=lambda: now[0])
    for second in range(1, 121):
        now[0] = float(second)
        meter.tick(50 if second <= 60 else 10)
    assert told.told[0] == (0.405, "4,050 of 10,000 rows, 50 rows/s, 1 min 59 s left")
    assert told.told[-1][1].startswith("7,600 of 10,000 rows, 10")
    assert meter.rows == 3600
    assert meter.seconds == 120


def test_without_a_total_no_time_is_promised():
    now, told = [0.0], Told()
    meter = Meter(told, None, 0, clock=lambda: now[0])
    now[0] = 2.0
    meter.tick(3)
    assert told.told == [(0.0, "3 rows, 1.5 rows/s")]


def test_numbers_for_people():
    assert [duration(s) for s in (0.4, 12.3, 59.6, 61, 7322, 90_000)] == [
        "0.4 s",
        "12 s",
        "1 min 0 s",
        "1 min 1 s",
        "2 h 2 min",
        "1 d 1 h",
    ]
    assert [rate_text(r) for r in (0.1234, 12.34, 123.4, 12345.6)] == ["0.123", "12.3", "123", "12,346"]


def test_gpus_are_those_that_are_visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [place.environment for place in on_gpus([1, 0])] == [
        {"CUDA_VISIBLE_DEVICES": "1"},
        {"CUDA_VISIBLE_DEVICES": "0"},
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc")
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in on_gpus([0, 1])] == ["4", "GPU-abc"]


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr("enginesmith.offline.workers.cores", lambda: 5)
    assert [place.options for place in on_cpu(2)] == [{"threads": 2}] * 2
    assert [place.environment for place in on_cpu(6)] == [{"OMP_NUM_THREADS": "1"}] * 6
