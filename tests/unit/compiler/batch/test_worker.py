"""The worker's commands, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from enginesmith.compiler.batch import worker
from enginesmith.compiler.batch.worker import Commands
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.errors import DataError, EngineError
from enginesmith.targets.base import EngineInfo, HostBound

SIGNATURE = Signature(
    inputs=(
        TensorSpec("ids", "int64", ("batch", "length")),
        TensorSpec("mask", "bool", ("batch", "length")),
        TensorSpec("table", "float32", (3,)),
    ),
    axes={"batch": AxisRange(1, 2, 8), "length": AxisRange(1, 4, 16)},
)
SAMPLE = {
    "ids": np.arange(8).reshape(2, 4),
    "mask": np.ones((2, 4), bool),
    "table": np.zeros(3, np.float32),
}


class Target:
    """Opens runners that note the shapes of their inputs, and how often they were opened, reset and closed."""

    def __init__(self) -> None:
        self.shapes: list[dict[str, tuple[int, ...]]] = []
        self.opened = self.resets = self.closed = 0
        self.error: Exception | None = None

    def runner(self, directory: Path, info: EngineInfo) -> Any:
        self.opened += 1
        return self

    def bind(self, inputs: Any) -> Any:
        if self.error is not None:
            raise self.error
        self.shapes.append({name: array.shape for name, array in inputs.items()})
        return HostBound(lambda: self.run(inputs))

    def run(self, inputs: Any) -> Any:
        np.ones(len(inputs["ids"]) << 20)
        return {}

    def reset(self) -> None:
        self.resets += 1

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Target:
    made = Target()
    monkeypatch.setattr(worker, "get_target", lambda name, options: made)
    monkeypatch.setattr(worker, "volunteer", lambda: None)  # this process is not to be killed first
    return made


def opened(tmp_path: Path, *, stateful: bool = False) -> Commands:
    EngineInfo("e", "fake", "fp32", "model", SIGNATURE, stateful=stateful).write(tmp_path)
    np.savez(tmp_path / "sample.npz", **SAMPLE)
    commands = Commands()
    assert commands.open(str(tmp_path), str(tmp_path / "sample.npz"), on_gpu=False) == {}
    return commands


def test_a_probe_sizes_every_input_and_tells_time_and_memory(tmp_path: Path, target: Target) -> None:
    found = opened(tmp_path).probe({"batch": 8, "length": 4}, growth_bytes=None)
    assert target.shapes == [{"ids": (8, 4), "mask": (8, 4), "table": (3,)}]
    assert target.resets == 1
    assert found["ms"] > 0
    assert found["memory_bytes"] > 8 * (8 << 20)


def test_a_probe_beyond_its_memory_fails_in_words(tmp_path: Path, target: Target) -> None:
    # so much that what other tests took and gave back cannot hold it
    found = opened(tmp_path).probe({"batch": 1024, "length": 4}, growth_bytes=16 << 20)
    assert found["failed"].startswith("out of memory: Unable to allocate 8.00 GiB")
    assert "failed" not in opened(tmp_path).probe({"batch": 1, "length": 4}, growth_bytes=64 << 20)


def test_a_size_that_the_engine_refuses_fails_in_words(tmp_path: Path, target: Target) -> None:
    commands = opened(tmp_path)
    target.error = DataError("input 'ids' has the wrong shape", expected="1..2..8")
    assert commands.probe({"batch": 64, "length": 4}, growth_bytes=None) == {
        "failed": "input 'ids' has the wrong shape"
    }


def test_batches_are_timed_side_by_side_on_inputs_of_their_own(tmp_path: Path, target: Target) -> None:
    batches = [{"batch": n, "sizes": {"batch": n, "length": 4}, "slice_s": 0.002} for n in (1, 4)]
    settings = {"rounds": 6, "slice_s": 0.001, "warmup_s": 0.001}
    found = opened(tmp_path).time(batches, None, settings)
    assert [shapes["ids"] for shapes in target.shapes] == [(1, 4), (4, 4)]
    assert set(found["timings"]) == {"1", "4"}
    assert found["timings"]["4"]["p99_ms"] >= found["timings"]["4"]["p50_ms"] > 0
    assert (found["skipped"], target.opened, target.closed) == ({}, 1, 0)


def test_calls_with_transfers_run_on_inputs_of_their_own_too(tmp_path: Path, target: Target) -> None:
    batches = [{"batch": 4, "sizes": {"batch": 4, "length": 4}, "slice_s": 0.002}]
    settings = {"rounds": 6, "slice_s": 0.001, "warmup_s": 0.001, "transfers": True}
    found = opened(tmp_path).time(batches, None, settings)
    assert set(found["timings"]) == {"4"}
    assert target.shapes == []


def test_an_engine_with_state_is_opened_for_each_batch(tmp_path: Path, target: Target) -> None:
    batches = [{"batch": n, "sizes": {"batch": n, "length": 4}, "slice_s": 0.002} for n in (1, 4)]
    opened(tmp_path, stateful=True).time(batches, None, {"rounds": 6, "slice_s": 0.001, "warmup_s": 0.001})
    assert (target.opened, target.closed) == (3, 2)


def test_the_engine_is_closed_at_the_end(tmp_path: Path, target: Target) -> None:
    commands = opened(tmp_path)
    commands.close()
    assert target.closed == 1
    with pytest.raises(EngineError, match="no engine is loaded"):
        commands.probe({"batch": 1, "length": 4}, growth_bytes=None)
    commands.close()
