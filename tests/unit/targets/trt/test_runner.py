"""Runners over a worker that stands in for TensorRT: it computes y = 2 x."""

import gc
import sys
import threading

import numpy as np
import pytest

from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.errors import DataError, EngineError, EngineMismatchError
from enginesmith.targets.trt import build
from enginesmith.targets.trt import runner as runner_module
from enginesmith.targets.trt.runner import WorkerRunner, open_engine

SIGNATURE = Signature(
    inputs=(TensorSpec("x", "int64", ("batch",)),),
    outputs=(TensorSpec("y", "int64", ("batch",)),),
    axes={"batch": AxisRange(1, 4, 8)},
)

STAND_IN = """
import json, os, sys
import numpy as np
bound, released = {}, []
def answer(**value):
    print(json.dumps(value), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    command = request["command"]
    if command == "load":
        scratch = request["scratch"]
        assert request["device"] == 1
        if "other" in request["plan"]:
            answer(error={"kind": "mismatch", "message": "built by another version"})
            continue
        answer(result={})
    if command in ("run", "bind"):
        x = np.load(request["files"]["x"])
    if command == "run" and x.size == 7:
        os.kill(os.getpid(), 11)
    elif command == "run" and x.size > 8:
        answer(error={"kind": "data", "message": "no profile"})
    elif command == "bind":
        released += request["release"]
        bound[len(bound) + 1] = x
        answer(result={"binding": len(bound), "released": released})
    elif command == "launch":
        answer(result={})
    elif command == "timed":
        n = request["iterations"]
        answer(result={"host": [2.0] * n, "device": [1.0] * n, "graph_refusal": "switched off"})
    elif command == "profile":
        answer(result={"runs": [{"double": 0.5}] * request["iterations"], "layers": [{"Name": "double"}]})
    elif command in ("run", "fetch"):
        x = x if command == "run" else bound[request["binding"]]
        file = os.path.join(scratch, "out.npy")
        np.save(file, (2 * x).astype(np.int32))
        answer(result={"y": file})
    elif command == "close":
        answer(result={})
"""


@pytest.fixture
def open_plan(monkeypatch, tmp_path):
    """Opens a plan of that name through the stand-in."""
    monkeypatch.setattr(build, "in_process", lambda module: False)
    monkeypatch.setattr(build, "command", lambda module: [sys.executable, "-c", STAND_IN])
    return lambda name="model.plan": open_engine("tensorrt", tmp_path / name, SIGNATURE, cuda_graph=True, device=1)


def test_arrays_travel_to_the_worker_and_back(open_plan):
    runner = open_plan()
    assert isinstance(runner, WorkerRunner)
    outputs = runner.run({"x": np.arange(4)})
    np.testing.assert_array_equal(outputs["y"], 2 * np.arange(4))
    assert outputs["y"].dtype == np.int64
    runner.reset()
    runner.close()


def test_threads_do_not_mix_their_arrays(open_plan):
    runner, wrong = open_plan(), []

    def run(number):
        results = (runner.run({"x": np.full(4, number)})["y"] for _ in range(5))
        wrong.extend(result for result in results if not np.array_equal(result, np.full(4, 2 * number)))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    runner.close()


def test_bounds_have_times_of_host_and_device(open_plan):
    runner = open_plan()
    bound = runner.bind({"x": np.arange(3)})
    bound.run()
    bound.synchronize()
    assert bound.timed(2) == ([2.0, 2.0], [1.0, 1.0])
    assert bound.graph_refusal == "switched off"
    np.testing.assert_array_equal(bound.outputs()["y"], 2 * np.arange(3))
    del bound
    gc.collect()
    assert runner._unused == [1]
    runner.bind({"x": np.arange(3)})
    runner.close()


def test_errors_of_the_worker(open_plan):
    runner = open_plan()
    with pytest.raises(DataError, match="the tensorrt worker: no profile"):
        runner.run({"x": np.arange(9)})
    with pytest.raises(EngineError, match="the tensorrt worker crashed with SIGSEGV during 'run'"):
        runner.run({"x": np.arange(7)})
    runner.close()


def test_a_plan_of_another_version_leaves_no_worker(open_plan, monkeypatch):
    killed = []
    kill = runner_module.Worker.kill
    monkeypatch.setattr(runner_module.Worker, "kill", lambda self: killed.append(self.pid) or kill(self))
    with pytest.raises(EngineMismatchError, match="built by another version"):
        open_plan("other.plan")
    assert killed


def test_a_runner_that_is_forgotten_ends_its_worker(open_plan):
    runner = open_plan()
    process = runner._worker._process
    del runner
    gc.collect()
    assert process.poll() is not None


def test_tensors_of_torch_are_taken(open_plan):
    torch = pytest.importorskip("torch")
    runner = open_plan()
    outputs = runner.run({"x": torch.arange(4)})
    np.testing.assert_array_equal(outputs["y"], 2 * np.arange(4))
    runner.close()


def test_a_profile_travels_back_from_the_worker(open_plan):
    runner = open_plan()
    runs, layers = runner.profile({"x": np.arange(4)}, 3)
    assert runs == [{"double": 0.5}] * 3
    assert layers == [{"Name": "double"}]
    assert runner._unused == [1], "the next bind releases what it bound"
    runner.close()
