from __future__ import annotations

import dataclasses
import json

import pytest

from enginesmith.compiler.diagnosis import ceilings as module
from enginesmith.compiler.diagnosis import stopwatch
from enginesmith.compiler.diagnosis.ceilings import Ceilings, better, ceilings
from enginesmith.compiler.graph.work import Work
from enginesmith.compiler.storage.cache import Cache
from enginesmith.errors import EngineError


def test_bandwidth_follows_the_size(cpu):
    assert [cpu.bandwidth_gb_s(size) for size in (1, 1e6, 1e7, 1e8, 1e12)] == pytest.approx([100, 100, 55, 10, 10])
    assert cpu.memory_gb_s == 10


def test_the_least_times(cpu):
    work = Work(flops=3e8, weight_bytes=1e6, moved_bytes=1e6, precision="bf16", heavy=2e8)
    assert cpu.compute_ms(work) == pytest.approx(2e8 / 200e9 * 1e3 + 1e8 / 100e9 * 1e3)
    assert cpu.bandwidth_ms(work, 1e8) == pytest.approx(0.1 + 0.01), "weights come from memory, tensors from a cache"
    assert cpu.launch_ms() == cpu.launch_ms(graph=True) == 0.001
    product = Work(flops=1e8, heavy=1e8)
    assert cpu.compute_ms(product, aligned=False) == 2 * cpu.compute_ms(product) == 2.0


def test_a_precision_without_a_ceiling_runs_at_the_rate_of_fp32(cpu):
    assert cpu.compute_ms(Work(flops=1e8, heavy=1e8, precision="fp8")) == 1.0


def test_the_better_of_two_measurements(cpu):
    busy = dataclasses.replace(
        cpu, gflops={"fp32": 30.0, "int8": 500.0}, bandwidths=((1e6, 120.0), (1e8, 1.0)), launch_us=0.5, busy=0.7
    )
    found = better(busy, cpu)
    assert found.gflops == {"fp32": 100.0, "int8": 500.0, "bf16": 200.0}
    assert found.bandwidths == ((1e6, 120.0), (1e8, 10.0))
    assert (found.launch_us, found.busy) == (0.5, 0.0)


def test_what_an_engine_reaches_raises_a_ceiling(cpu):
    assert cpu.raised({"fp32": 120.0, "int8": 1.0, "fp8": 9e9}).gflops == {"fp32": 120.0, "bf16": 200.0, "int8": 400.0}
    assert cpu.raised({"fp32": 90.0}) is cpu


@pytest.fixture
def measured(monkeypatch, cpu):
    """What the next measurement gives, and how many there were."""
    state = {"next": cpu, "count": 0}

    def measure(device):
        state["count"] += 1
        return state["next"]

    monkeypatch.setattr(module, "_measured", measure)
    return state


def test_ceilings_are_measured_once_a_machine(tmp_path, measured, cpu):
    cache = Cache(tmp_path)
    assert ceilings("cpu", cache) == ceilings("cpu", cache) == cpu
    assert measured["count"] == 1
    (file,) = (tmp_path / "machine").glob("ceilings-cpu-*.json")
    assert Ceilings.from_json(json.loads(file.read_text())) == cpu
    file.write_text('{"device": "cpu"')
    assert ceilings("cpu", cache) == cpu
    assert measured["count"] == 2, "what is damaged is measured again"


def test_what_was_measured_on_a_busy_machine_is_measured_again(tmp_path, measured, cpu):
    cache = Cache(tmp_path)
    measured["next"] = dataclasses.replace(cpu, gflops={"fp32": 20.0, "int8": 900.0}, busy=0.5)
    assert ceilings("cpu", cache).busy == 0.5
    measured["next"] = cpu
    assert ceilings("cpu", cache).gflops == {"fp32": 100.0, "int8": 900.0, "bf16": 200.0}
    assert ceilings("cpu", cache).busy == 0.0
    assert measured["count"] == 2


def test_a_cache_that_cannot_be_written_is_no_failure(measured, cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(module.os, "replace", lambda *names: (_ for _ in ()).throw(OSError("full")))
    assert ceilings("cpu", Cache(tmp_path)) == cpu


def test_this_machine_has_ceilings(monkeypatch):
    monkeypatch.setattr(stopwatch, "EACH_S", 0.005)
    monkeypatch.setattr(stopwatch, "LENGTH", 128)
    monkeypatch.setattr(stopwatch, "WORKING_BYTES", (2**16, 2**20))
    found = stopwatch.measure("cpu")
    assert found.gflops["fp32"] > 0.05
    assert found.unaligned_gflops["fp32"] <= found.gflops["fp32"]
    assert all(rate > 0.01 for _, rate in found.bandwidths)
    assert 0.01 < found.launch_us < 10_000
    assert Ceilings.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_without_a_gpu_its_ceilings_are_an_error():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EngineError, match="the ceilings of the GPU cannot be measured"):
        stopwatch.measure("cuda")
