"""How CUDA graphs are captured, with what stands for torch's."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch

from enginesmith.targets.inductor import graphs
from enginesmith.targets.inductor.graphs import GRAPHS, Graphs


class Graph:
    """Has a pool of its own, or that of another graph."""

    def __init__(self):
        self._pool = object()

    def pool(self):
        return self._pool

    def replay(self):
        """Launches nothing."""


@pytest.fixture
def captures(monkeypatch):
    """How many captures are under way, and the pools and streams that they were given."""
    seen = {"under way": 0, "most": 0, "pools": [], "streams": [], "cleared": 0}

    @contextlib.contextmanager
    def graph(made, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        seen["streams"].append(stream)
        seen["under way"] += 1
        seen["most"] = max(seen["most"], seen["under way"])
        seen["pools"].append(pool)
        made._pool = pool or made._pool
        yield
        time.sleep(0.02)
        seen["under way"] -= 1

    def clear():
        assert not seen["under way"]
        seen["cleared"] += 1

    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return seen


def test_graphs_have_their_memory_in_common_but_for_those_apart(captures):
    made, calls = Graphs(), []
    launches = [made.captured(lambda: calls.append(1), apart=apart) for apart in (True, False, False, True, False)]
    assert len(calls) == 10
    assert captures["cleared"] == 5
    own = [launch.__self__.pool() for launch in launches]
    assert captures["pools"] == [None, None, own[1], None, own[1]]
    assert len(set(map(id, own))) == 3
    assert len(set(map(id, captures["streams"]))) == 1


def test_a_pool_is_new_once_its_graphs_are_gone(captures):
    made = Graphs()
    launch = made.captured(lambda: None)
    del launch
    made.captured(lambda: None)
    assert captures["pools"] == [None, None]


def test_further_calls_go_without_a_graph(captures, monkeypatch):
    monkeypatch.setattr(graphs, "GRAPHS", 2)
    made, call = Graphs(), list
    kept = [made.captured(call) for _ in range(4)]
    assert [launch is call for launch in kept] == [False, False, True, True]
    kept.clear()
    assert made.captured(call) is not call
    assert GRAPHS == 64


def test_captures_take_turns(captures):
    threads = [threading.Thread(target=Graphs().captured, args=(list,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(captures["pools"]), captures["most"]) == (4, 1)
