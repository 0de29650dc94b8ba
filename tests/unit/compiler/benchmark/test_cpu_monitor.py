from types import SimpleNamespace

import psutil
import pytest

from enginesmith.compiler.benchmark import cpu_monitor
from enginesmith.compiler.benchmark.cpu_monitor import ForeignCpu


def times(seconds):
    return SimpleNamespace(user=seconds, system=0.0)


@pytest.fixture
def machine(monkeypatch):
    """Two processors for ten seconds, whose busy times the test sets."""
    state = SimpleNamespace(now=0.0, busy=100.0, own=5.0, children=[])
    process = SimpleNamespace(cpu_times=lambda: times(state.own), children=lambda recursive: state.children)
    monkeypatch.setattr(psutil, "cpu_times", lambda: times(state.busy))
    monkeypatch.setattr(psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(psutil, "Process", lambda: process)
    monkeypatch.setattr(cpu_monitor, "time", SimpleNamespace(perf_counter=lambda: state.now))
    return state


def test_share_leaves_out_this_process_and_its_children(machine):
    machine.children = [SimpleNamespace(cpu_times=lambda: times(machine.own))]
    foreign = ForeignCpu()
    machine.now, machine.busy, machine.own = 10.0, 100.0 + 8 + 5, 5.0 + 4
    assert foreign.share() == pytest.approx(5 / 20)


def test_share_never_leaves_its_range(machine):
    foreign = ForeignCpu()
    machine.now, machine.own = 10.0, 9.0
    assert foreign.share() == 0.0
    machine.busy = 10**6
    assert foreign.share() == 1.0


def test_a_child_that_ends_meanwhile_is_left_out(machine):
    def gone():
        raise psutil.NoSuchProcess(1)

    foreign = ForeignCpu()
    machine.children = [SimpleNamespace(cpu_times=gone)]
    machine.now = 10.0
    assert foreign.share() == 0.0
