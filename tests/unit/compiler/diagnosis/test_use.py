from __future__ import annotations

import time

import numpy as np
import pytest

from enginesmith.compiler.data import open_data
from enginesmith.compiler.diagnosis import reading as reading_module
from enginesmith.compiler.diagnosis import use as use_module
from enginesmith.compiler.diagnosis.reading import Reading, time_reading
from enginesmith.compiler.diagnosis.use import fragmentation, watch
from enginesmith.compiler.signature import parse_inputs
from enginesmith.targets.base import HostBound

SIGNATURE = parse_inputs(["x:1x4"], ["x:0=1..4..8"])


def test_a_call_is_watched(monkeypatch):
    monkeypatch.setattr(use_module, "WATCHED_S", 0.05)
    found = watch(HostBound(lambda: time.sleep(0.005) or {}), on_gpu=False)
    assert 5 <= found.call_ms < 50
    assert found.host_ms == found.call_ms
    assert found.calls >= 1
    assert 0 <= found.cpu <= 1
    assert (found.gpu, found.gpu_memory_bytes, found.fragmentation) == (None, None, {})
    assert found.to_json()["call_ms"] == found.call_ms


def test_device_time_is_that_of_a_call_where_there_is_a_clock(monkeypatch):
    class Device(HostBound):
        def timed(self, iterations):
            return [3.0] * iterations, [1.0] * iterations

    monkeypatch.setattr(use_module, "GPU_WATCHED_S", 0.01)
    found = watch(Device(dict), on_gpu=True)
    assert (found.call_ms, found.host_ms) == (1.0, 3.0)


def test_fragmentation_is_what_is_split_and_idle_of_what_is_reserved():
    stats = {
        "allocated_bytes.all.current": 600, "reserved_bytes.all.current": 1000,
        "inactive_split_bytes.all.current": 250, "num_alloc_retries": 1,
    }  # fmt: skip
    assert fragmentation(lambda: stats) == {
        "allocated_bytes": 600, "reserved_bytes": 1000, "inactive_split_bytes": 250, "retries": 1, "share": 0.25,
    }  # fmt: skip
    assert fragmentation(lambda: {}) == {}


def slow_data(tmp_path, seconds):
    (tmp_path / "slow.py").write_text(
        "import time\nimport numpy as np\ndef batches():\n    for _ in range(4):\n"
        f"        time.sleep({seconds})\n        yield {{'x': np.zeros((4, 4), np.float32)}}\n"
    )
    return open_data(f"{tmp_path / 'slow.py'}:batches", SIGNATURE)


def test_reading_is_timed_batch_by_batch(tmp_path):
    found = time_reading(slow_data(tmp_path, 0.01))
    assert found.batches == 4
    assert found.read_ms >= 10
    assert found.description == "slow.py:batches" or "slow.py" in found.description


def test_reading_ends_after_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(reading_module, "READING_S", 0.02)
    assert time_reading(slow_data(tmp_path, 0.015)).batches < 4


def test_made_up_inputs_are_not_read():
    assert time_reading(open_data(None, SIGNATURE)) is None


@pytest.mark.parametrize(("read_ms", "share", "bound"), [(1.0, 0.25, False), (9.0, 0.75, True)])
def test_input_bound(read_ms, share, bound):
    found = Reading("data", 5, read_ms, read_ms)
    assert found.share(3.0) == share
    assert found.is_bound(3.0) is bound
    assert Reading("data", 5, 0.0, 0.0).share(0.0) == 0.0
    assert np.isfinite(found.share(0.0))
