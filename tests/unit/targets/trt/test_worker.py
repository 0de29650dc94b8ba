"""The worker as a process of its own, over modules that stand in for TensorRT."""

import os
import signal
import subprocess
import sys
import time

import pytest

from enginesmith.errors import BuildError
from enginesmith.targets._worker import Worker
from enginesmith.targets.trt import build


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts the worker over a module with that code."""

    def start(code, log=lambda line: None):
        (tmp_path / "standin.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return Worker([sys.executable, str(build.SCRIPT), "standin"], name="the worker", log=log)

    return start


def test_what_libraries_print_does_not_reach_the_channel(start):
    log = []
    with start("import os\nprint('hello')\nos.system('echo native')\n__version__ = '1.2'", log.append) as worker:
        assert worker.call("versions", timeout_s=60)["version"] == "1.2"
    assert sorted(log) == ["hello", "native"]


def test_a_module_that_cannot_be_imported_is_a_finding(start):
    with start("raise ImportError('libnvinfer.so.8 is missing')") as worker:
        found = worker.call("versions", timeout_s=60)
    assert found["version"] is None
    assert found["error"] == "ImportError: libnvinfer.so.8 is missing"


def test_the_folder_of_the_script_hides_no_package(start):
    """tensorrt.py beside the script is a module of enginesmith and must not be taken for TensorRT."""
    with start("import sys\n__version__ = ';'.join(sys.path)") as worker:
        assert str(build.SCRIPT.parent) not in worker.call("versions", timeout_s=60)["version"].split(";")


def test_an_error_that_nobody_foresaw_is_told_with_its_trace(start):
    log = []
    with (
        start("__version__ = '1.2'", log.append) as worker,
        pytest.raises(BuildError, match=r"the worker failed: TypeError: .*unexpected keyword argument 'speed'"),
    ):
        worker.call("versions", timeout_s=60, speed="high")
    assert any("Traceback" in line for line in log)


def test_a_run_before_an_engine_is_loaded(start):
    with start("") as worker, pytest.raises(BuildError, match="no engine is loaded"):
        worker.call("run", timeout_s=60, files={})


IDLE = 'worker.call("versions", timeout_s=600)'
BUILDING = (
    'worker.call("build", timeout_s=600, scratch=sys.argv[1], onnx="", plan="", layers="", profiles=[], options={},'
    " types={}, timing_cache=None)"
)


@pytest.mark.parametrize("call", [IDLE, BUILDING])
def test_the_worker_dies_with_a_parent_that_is_killed(tmp_path, monkeypatch, call):
    (tmp_path / "standin.py").write_text("import time\ntime.sleep(600)" if call == BUILDING else "__version__ = '1.2'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    code = f"""
import sys, time
from enginesmith.targets._worker import Worker
worker = Worker([sys.executable, {str(build.SCRIPT)!r}, "standin"], name="worker")
print(worker.pid, flush=True)
{call}
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code, str(scratch)], stdout=subprocess.PIPE, text=True)
    try:
        pid = int(parent.stdout.readline())
        time.sleep(0.5)  # into the import, where it is busy
        assert alive(pid)
        os.kill(parent.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not alive(pid)
        assert scratch.exists() == (call == IDLE)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
