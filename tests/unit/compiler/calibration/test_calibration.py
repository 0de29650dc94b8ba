from __future__ import annotations

import numpy as np
import pytest

from enginesmith.compiler.calibration import Calibration, CalibrationSettings, Statistics
from enginesmith.compiler.storage.cache import Cache
from enginesmith.compiler.storage.entries import scan
from enginesmith.errors import DataError, GraphError

NET = """g (float[N,4] x) => (float[N,3] y) <float[4,3] w = {1,0,2, 1,0,2, 1,0,2, 1,0,2}> {
    h = MatMul(x, w)  y = Relu(h) }"""


class Samples(list):
    description = "made up"
    random = False
    digest = "digest"


def batches(*arrays: object) -> Samples:
    return Samples([{"x": np.asarray(array, np.float32)} for array in arrays])


def ramp(rows: int, scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng(0).standard_normal((rows, 4)).astype(np.float32)


def test_statistics_are_those_of_all_batches(read):
    graph, parts = read(NET), (ramp(5), ramp(2, 3.0), ramp(7, 0.1))
    found = Calibration(batches(*parts)).statistics(graph)
    x = np.concatenate(parts)
    h = x @ np.float32([[1, 0, 2]] * 4)
    assert set(found) == {"x", "h", "y"}
    assert found.samples == 14
    for name, array in (("x", x), ("h", h), ("y", np.maximum(h, 0))):
        own = found[name]
        assert own.count == array.size
        np.testing.assert_allclose([own.low, own.high], [array.min(), array.max()], rtol=1e-5)
        np.testing.assert_allclose(own.channel_low, array.min(0), rtol=1e-5)
        np.testing.assert_allclose(own.channel_high, array.max(0), rtol=1e-5)
        np.testing.assert_allclose(own.channel_mean, array.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(own.rms, np.sqrt(np.mean(array.astype(np.float64) ** 2)), rtol=1e-5)
        assert own.histogram.counts.sum() == own.exponents.sum() == array.size
        expected, _ = np.histogram(array, own.histogram.edges)
        np.testing.assert_allclose(own.histogram.counts, expected, atol=2)
        assert own.zeros == np.count_nonzero(array == 0)
        assert own.smallest == pytest.approx(np.abs(array[array != 0]).min())


def test_another_pass_collects_what_is_missing_only(read, monkeypatch):
    samples, runs = batches(ramp(4)), []
    calibration = Calibration(samples)
    graph = read(NET)
    assert set(calibration.statistics(graph, ["h"])) == {"h"}
    monkeypatch.setattr(Samples, "__iter__", lambda self: runs.append(1) or list.__iter__(self))
    assert set(calibration.statistics(graph, ["h"])) == {"h"}
    assert not runs
    assert set(calibration.statistics(graph, ["h", "y"])) == {"h", "y"}
    assert runs


def test_statistics_are_kept_on_disk(read, tmp_path):
    graph = read(NET)
    cache = Cache(tmp_path)
    first = Calibration(batches(ramp(4)), cache=cache).statistics(graph)
    assert [entry.what for entry in scan(tmp_path, ["calibration"])] == [{"data": "made up"}]
    again = Calibration(batches(ramp(4, 9.0)), cache=cache).statistics(graph)  # known by its digest
    assert again.digest == first.digest
    other = Calibration(batches(ramp(4, 9.0)), CalibrationSettings(seed=1), cache).statistics(graph)
    assert other.digest != first.digest


def test_saving_and_loading_keeps_everything(read, tmp_path):
    found = Calibration(batches(ramp(4))).statistics(read(NET))
    found.save(tmp_path / "a.npz")
    loaded = Statistics.load(tmp_path / "a.npz")
    assert loaded.digest == found.digest
    assert list(loaded) == list(found)
    for name in found:
        np.testing.assert_equal(vars(loaded[name]) | {"histogram": 0}, vars(found[name]) | {"histogram": 0})
        np.testing.assert_equal(vars(loaded[name].histogram), vars(found[name].histogram))


def test_a_damaged_file_is_refused_and_collected_again(read, tmp_path):
    graph, cache = read(NET), Cache(tmp_path)
    first = Calibration(batches(ramp(4)), cache=cache).statistics(graph)
    (file,) = tmp_path.glob("calibration/*/content/*")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match="holds no statistics of tensors"):
        Statistics.load(file)
    assert Calibration(batches(ramp(4)), cache=cache).statistics(graph).digest == first.digest


def test_statistics_that_were_extended_take_the_place_of_the_first(read, tmp_path, monkeypatch):
    graph, cache = read(NET), Cache(tmp_path)
    Calibration(batches(ramp(4)), cache=cache).statistics(graph, ["h"])
    Calibration(batches(ramp(4)), cache=cache).statistics(graph, ["y"])
    monkeypatch.setattr(Samples, "__iter__", lambda self: pytest.fail("collected again"))
    assert set(Calibration(batches(ramp(4)), cache=cache).statistics(graph, ["h", "y"])) == {"h", "y"}


def test_made_up_data_is_refused_unless_allowed(read):
    samples = batches(ramp(4))
    samples.random = True
    with pytest.raises(DataError, match=r"calibration on made up(.|\n)*give --data"):
        Calibration(samples)
    found = Calibration(samples, CalibrationSettings(allow_random=True)).statistics(read(NET))
    assert "random" in {finding.kind for finding in found.findings()}


def test_no_samples_and_no_such_tensor(read):
    with pytest.raises(DataError, match="there are no samples"):
        Calibration(Samples()).statistics(read(NET))
    with pytest.raises(GraphError, match="no tensor 'z'"):
        Calibration(batches(ramp(1))).statistics(read(NET), ["z"])
