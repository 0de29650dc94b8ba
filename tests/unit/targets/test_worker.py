import sys
import threading
import time

import pytest

from enginesmith.errors import BuildError, DataError, EngineError, EngineMismatchError, TargetUnavailableError
from enginesmith.targets._worker import Worker

ECHO = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    print("working on " + request["command"], file=sys.stderr, flush=True)
    if "error" in request:
        print(json.dumps({"error": request["error"]}), flush=True)
    else:
        print(json.dumps({"result": request}), flush=True)
"""

HANG = "import time\ntime.sleep(600)"


def python(code, **arguments):
    return Worker([sys.executable, "-c", code], name="the fake", **arguments)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_dead(pid, seconds=10.0):
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def test_a_call_gives_the_result_and_the_log():
    log = []
    with python(ECHO, log=log.append) as worker:
        assert worker.call("build", timeout_s=30, size=[1, 2]) == {"command": "build", "size": [1, 2]}
        worker.call("again", timeout_s=30)
    assert log[0] == "working on build"


def test_progress_is_passed_on():
    progress = []
    code = 'print(\'{"progress": [0.5, "tactics"]}\'); print(\'{"result": {}}\')'
    with python(code) as worker:
        assert worker.call("build", timeout_s=30, progress=lambda *args: progress.append(args)) == {}
    assert progress == [(0.5, "tactics")]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.kill(os.getpid(), 11)", r"the fake crashed with SIGSEGV during 'build'"),
        (
            "import os; os.kill(os.getpid(), 9)",
            r"was killed \(SIGKILL\) during 'build', most likely because memory ran",
        ),
        ("import sys; sys.exit(3)", r"ended with exit code 3 during 'build'"),
        ("print('tada')\nimport time; time.sleep(600)", r"(?s)something else than JSON.*found: tada"),
        ("print('[1]')\nimport time; time.sleep(600)", r"(?s)something else than JSON.*found: \[1\]"),
        (f"import os; os.close(1)\n{HANG}", r"closed its channel during 'build'"),
    ],
)
def test_what_becomes_of_a_worker_is_told(code, message, monkeypatch):
    monkeypatch.setattr("enginesmith.targets._worker._CLOSING_S", 0.3)
    with python(code) as worker:
        with pytest.raises(BuildError, match=message):
            worker.call("build", timeout_s=30)
        assert not alive(worker.pid)


def test_the_last_lines_of_the_log_come_with_the_error():
    code = "import sys\nfor i in range(20): print(f'line {i}', file=sys.stderr)\nsys.exit(1)"
    with python(code) as worker, pytest.raises(BuildError, match=r"(?s)the log ends with\n    line 12\n.*line 19"):
        worker.call("build", timeout_s=30)


def test_a_worker_that_hangs_is_stopped_with_its_children():
    code = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, file=sys.stderr, flush=True)
{HANG}
"""
    log = []
    with python(code, log=log.append) as worker:
        with pytest.raises(BuildError, match=r"took longer than 1 s for 'build' and was stopped"):
            worker.call("build", timeout_s=1)
        assert not alive(worker.pid)
    assert wait_until_dead(int(log[0]))


@pytest.mark.parametrize(
    ("kind", "error"),
    [("unavailable", TargetUnavailableError), ("mismatch", EngineMismatchError), ("data", DataError)],
)
def test_an_error_of_a_known_kind(kind, error):
    with python(ECHO) as worker:
        with pytest.raises(error, match="the fake: no such thing"):
            worker.call("run", timeout_s=30, error={"kind": kind, "message": "no such thing"})
        assert worker.call("run", timeout_s=30) == {"command": "run"}


def test_any_other_error_is_a_failure_of_the_kind_asked_for():
    with (
        python(ECHO, failure=EngineError) as worker,
        pytest.raises(EngineError, match=r"(?s)the fake failed: boom.*the log ends with\n    working on run"),
    ):
        worker.call("run", timeout_s=30, error={"kind": "failed", "message": "boom"})


def test_a_call_after_the_end():
    worker = python(ECHO)
    worker.kill()
    with pytest.raises(BuildError, match="the fake has ended"):
        worker.call("build", timeout_s=30)


def test_a_program_that_does_not_exist():
    with pytest.raises(
        TargetUnavailableError, match=r"(?s)the fake cannot be started: No such.*found: /nowhere/python"
    ):
        Worker(["/nowhere/python"], name="the fake")


def test_an_interrupt_ends_the_worker():
    code = f"import sys; print('started', file=sys.stderr, flush=True)\n{HANG}"

    def interrupt(line):
        raise KeyboardInterrupt

    worker = python(code, log=interrupt)
    with pytest.raises(KeyboardInterrupt):
        worker.call("build", timeout_s=30)
    assert not alive(worker.pid)


def test_threads_take_turns():
    with python(ECHO) as worker:
        results = {}

        def call(number):
            results[number] = worker.call("run", timeout_s=30, number=number)["number"]

        threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {number: number for number in range(8)}
