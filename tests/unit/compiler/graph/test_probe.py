from __future__ import annotations

import sys

import numpy as np
import pytest

from enginesmith.compiler.graph import probe
from enginesmith.errors import GraphError, TargetUnavailableError

NET = "g (float[N,2] x) => (float[N,2] y) <float k = {2}> { a = Mul(x, k)  i = Cast <to = 7> (a)  y = Sqrt(a) }"


def batch(*rows: tuple[float, float]) -> dict[str, np.ndarray]:
    return {"x": np.array(rows, np.float32).reshape(-1, 2)}


def test_run_gives_outputs_by_name(read):
    np.testing.assert_array_equal(probe.run(read(NET), batch((2, 8)))["y"], [[2, 4]])


def test_errors_of_onnx_runtime(read):
    with pytest.raises(GraphError, match=r"cannot run the graph(.|\n)*INVALID_ARGUMENT"):
        probe.run(read(NET), {"x": np.zeros((1, 3), np.float32)})
    with pytest.raises(GraphError, match="cannot load the graph"):
        probe.run(read("g () => (float16[2] y) { y = RandomNormal <shape = [2], dtype = 10> () }"), {})


def test_onnx_runtime_missing(read, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(TargetUnavailableError, match=r"ONNX Runtime is not installed(.|\n)*enginesmith\[cpu\]"):
        probe.run(read(NET), batch((1, 2)))


@pytest.mark.parametrize("optimized", [False, True])
def test_tapped_gives_outputs_and_tensors_by_name(read, optimized):
    graph = read(NET)
    before = graph.fingerprint()
    found = probe.Tapped(graph, ["x", "a", "y"], optimized=optimized)(batch((2, 8)))
    assert set(found) == {"x", "a", "y"}
    np.testing.assert_array_equal(found["a"], [[4, 16]])
    assert graph.fingerprint() == before


def test_tapped_refuses_tensors_that_are_not_there(read):
    with pytest.raises(GraphError, match="no tensor 'z' to look at"):
        probe.Tapped(read(NET), ["z"])
    with pytest.raises(GraphError, match="no tensor 'z' to look at"):
        probe.sizes(read(NET), ["z"], batch((1, 2)))


def test_sizes_are_cut_into_chunks(read):
    sizes = probe.sizes(read(NET), ["x", "a", "i"], batch((2, 8)))
    assert sizes == {"x": 8, "a": 8, "i": 16}
    assert probe.chunks(sizes, 16) == [["x", "a"], ["i"]]
    assert probe.chunks(sizes, 4) == [["x"], ["a"], ["i"]]
