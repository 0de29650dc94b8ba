"""Workers that die at some batch: each death is a result, and the next batch runs all the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from enginesmith.compiler.batch import processes
from enginesmith.compiler.batch.processes import Processes, Subject

FAKE = """
import json, os, sys, time
opened = probes = 0
for line in sys.stdin:
    request = json.loads(line)
    if request["command"] == "open":
        if "broken" in request["directory"]:
            sys.exit("no engine here")
        result = {}
    elif request["command"] == "probe":
        batch, probes = request["sizes"]["batch"], probes + 1
        assert request["sizes"]["length"] == 128
        if batch == 100:
            os.kill(os.getpid(), 9)
        if batch == 101:
            time.sleep(600)
        if batch == 102:
            kept = bytearray(b"x" * (1 << 29))
            time.sleep(600)
        if batch == 103:
            os.abort()
        result = {"failed": "out of memory: bad_alloc"} if batch == 104 else {"ms": probes, "memory_bytes": os.getpid()}
    elif request["command"] == "time":
        if any(item["batch"] == 100 for item in request["batches"]):
            os.kill(os.getpid(), 9)
        result = {
            "timings": {str(item["batch"]): {"p50_ms": item["slice_s"]} for item in request["batches"]},
            "skipped": {"7": "it failed"},
        }
    else:
        result = {}
    print(json.dumps({"result": result}), flush=True)
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Makes `Processes` over the fake worker."""
    monkeypatch.setattr(processes, "command", lambda: [sys.executable, "-c", FAKE])

    def start(name: str = "engine", **changes: Any) -> Processes:
        values: dict[str, Any] = {"sizes": {"length": 128}, "axis": "batch", "on_gpu": False, "probe_s": 20.0}
        return Processes(Subject(tmp_path / name, tmp_path / "sample.npz", **{**values, **changes}))

    return start


def test_probes_share_a_process_unless_they_are_to_be_alone(started: Any) -> None:
    with started() as running:
        shared = [running.probe(batch, alone=False) for batch in (1, 2)]
        alone = [running.probe(batch, alone=True) for batch in (4, 8)]
    assert [probe.ms for probe in (*shared, *alone)] == [1, 2, 1, 1]
    assert len({probe.memory_bytes for probe in (*shared, *alone)}) == 3


@pytest.mark.parametrize(
    ("batch", "changes", "reason"),
    [
        (100, {}, "the batch worker was killed (SIGKILL) during 'probe', most likely because memory ran out"),
        (101, {"probe_s": 0.5}, "the batch worker took longer than 0.5 s for 'probe' and was stopped"),
        (102, {"limit_bytes": 1 << 26}, "out of memory: it took 0."),
        (103, {}, "the batch worker crashed with SIGABRT during 'probe'"),
        (104, {}, "out of memory: bad_alloc"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_a_death_is_a_result(started: Any, batch: int, changes: dict[str, Any], reason: str, alone: bool) -> None:
    with started(**changes) as running:
        died = running.probe(batch, alone=alone)
        assert (died.batch, died.fits, died.ms) == (batch, False, None)
        assert died.reason.startswith(reason)
        assert running.probe(1, alone=False).ms == 1  # a new process


def test_an_engine_that_does_not_open_fits_nowhere(started: Any) -> None:
    with started("broken") as running:
        reason = "the batch worker ended with exit code 1 during 'open': no engine here"
        assert running.probe(1, alone=False).reason == reason
        assert running.time({1: 0.1}, {})[1] == {1: reason}


def test_timings_come_by_batch_and_a_death_skips_all_of_them(started: Any) -> None:
    with started() as running:
        assert running.time({1: 0.1, 2: 0.2}, {"rounds": 6}) == (
            {1: {"p50_ms": 0.1}, 2: {"p50_ms": 0.2}},
            {7: "it failed"},
        )
        timings, skipped = running.time({1: 0.1, 100: 0.1}, {"rounds": 6})
    assert timings == {}
    assert set(skipped) == {1, 100}
    assert "was killed (SIGKILL) during 'time'" in skipped[1]


def test_the_room_is_what_is_free_or_what_was_allowed(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "room_bytes", lambda: 1000)
    assert started().room_bytes() == 1000
    assert started(limit_bytes=400).room_bytes() == 400
    assert started(limit_bytes=4000).room_bytes() == 1000
