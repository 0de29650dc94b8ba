"""The two fences around a process that runs out of memory."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from enginesmith.compiler.batch import memory
from enginesmith.compiler.batch.memory import Watch, data_limit, forget_peak, reason_of, resident_bytes, status_bytes
from enginesmith.errors import EngineError

MIB = 1 << 20

HOG = """
import sys, time
print("ready", flush=True)
sys.stdin.readline()
kept = bytearray(b"x" * {size})
print("took it", flush=True)
time.sleep(60)
"""


def test_an_allocation_beyond_the_limit_fails_and_one_after_it_does_not() -> None:
    with data_limit(64 * MIB):
        assert np.ones(16 * MIB, np.uint8).all()
        with pytest.raises(MemoryError, match="Unable to allocate"):
            np.ones(1 << 34, np.uint8)  # more than what was given back could hold
    assert np.ones(256 * MIB, np.uint8).all()


def test_no_limit_is_no_limit() -> None:
    with data_limit(None):
        assert np.ones(128 * MIB, np.uint8).all()


def test_the_limit_is_lifted_after_an_error() -> None:
    def fail() -> None:
        with data_limit(MIB):
            raise RuntimeError("it failed")

    with pytest.raises(RuntimeError, match="it failed"):
        fail()
    assert np.ones(64 * MIB, np.uint8).all()


def test_the_peak_begins_anew() -> None:
    assert np.ones(128 * MIB, np.uint8).all()
    before = status_bytes("VmHWM")
    forget_peak()
    assert status_bytes("VmHWM") < before - 64 * MIB
    assert status_bytes("VmNothing") == 0


def hog(size: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOG.format(size=size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_the_watch_kills_what_takes_more_than_it_may() -> None:
    with hog(512 * MIB) as process:
        with Watch(process.pid, process.kill, growth_bytes=32 * MIB, period_s=0.005) as watch:
            print(file=process.stdin, flush=True)
            assert process.wait(30) == -9
        assert watch.reason.startswith("out of memory: it took 0.")
        assert "were left for it" in watch.reason
        assert resident_bytes(process.pid) == 0


def test_the_watch_kills_before_the_machine_has_nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with hog(0) as process:
        monkeypatch.setattr(memory, "available_bytes", lambda: 100 * MIB)
        with Watch(process.pid, process.kill, growth_bytes=None, period_s=0.005) as watch:
            assert process.wait(30) == -9
        assert "the machine had 0.10 GiB left" in watch.reason


def test_the_watch_leaves_alone_what_keeps_within() -> None:
    with hog(8 * MIB) as process:
        with Watch(process.pid, process.kill, growth_bytes=32 * MIB, period_s=0.005) as watch:
            print(file=process.stdin, flush=True)
            assert process.stdout is not None
            assert process.stdout.readline() == "took it\n"
            time.sleep(0.05)
        assert (watch.reason, process.poll()) == ("", None)
        process.kill()


def test_a_reserve_stays_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "total_bytes", lambda: 100_000 * MIB)
    monkeypatch.setattr(memory, "available_bytes", lambda: 30_000 * MIB)
    assert memory.room_bytes() == 20_000 * MIB
    monkeypatch.setattr(memory, "available_bytes", lambda: 9_000 * MIB)
    assert memory.room_bytes() == 0
    monkeypatch.setattr(memory, "total_bytes", lambda: 1_000 * MIB)
    assert memory.reserve_bytes() == 512 * MIB


def test_the_worker_is_killed_first() -> None:
    code = "from enginesmith.compiler.batch.memory import volunteer\nvolunteer()"
    code += "\nprint(open('/proc/self/oom_score_adj').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1000"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "out of memory: MemoryError"),
        (EngineError("ONNX Runtime failed to run the engine: std::bad_alloc"), "out of memory: ONNX Runtime failed"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), "out of memory: CUDA out of memory. Tried"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
            "out of memory:",
        ),
        (EngineError("Available memory of 12 is smaller than requested bytes of 13"), "out of memory: Available"),
        (EngineError("cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY"), "out of memory: cuMemAlloc_v2"),
        (RuntimeError("Out of memory: 3 GiB"), "Out of memory: 3 GiB"),
        (ValueError("shapes do not match\nat node 7"), "shapes do not match"),
        (
            EngineError("it failed: from a.cpp:1:\nFailed to allocate 12 bytes of memory"),
            "out of memory: it failed: from",
        ),
        (RuntimeError(), "RuntimeError"),
        (
            EngineError("it failed: from a.cpp:1:\nfrom b.cpp:2:\nno such shape\n"),
            "it failed: from a.cpp:1: no such shape",
        ),
    ],
)
def test_that_memory_ran_out_stands_first(error: Exception, reason: str) -> None:
    assert reason_of(error).startswith(reason)
    assert "\n" not in reason_of(error)


def test_the_log_may_tell_that_memory_ran_out() -> None:
    error = EngineError("the worker ended with exit code 1")
    assert reason_of(error, "it is broken") == "the worker ended with exit code 1: it is broken"
    assert reason_of(error, "libgomp: Thread creation failed: again").startswith("out of memory: the worker ended")
