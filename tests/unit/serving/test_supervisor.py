"""The supervisor, with shell scripts for servers and a probe that says what it is told."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from enginesmith.compiler.signature import Signature
from enginesmith.errors import EngineError, UsageError
from enginesmith.serving import supervisor as module
from enginesmith.serving import watch as watching_module
from enginesmith.serving.launch import Launch, Watching
from enginesmith.serving.probe import ProbeError
from enginesmith.serving.repository import Repository
from enginesmith.serving.signals import Signals
from enginesmith.serving.supervisor import Supervisor
from enginesmith.serving.watch import TroubleError, Watch

STUB = "$DIR/triton_python_backend_stub"
MODEL = f"cp /bin/sleep {STUB}; {STUB} 30 & echo $! > $DIR/m; mv $DIR/m $DIR/model; "
RUNS = "trap 'echo All models are stopped; exit 0' TERM; touch $DIR/up; while :; do sleep 0.02; done"
DEAF = RUNS.replace("echo All models are stopped; exit 0", "")


class NoJanitor:
    def watch(self, server: int | None) -> None:
        """Needed where this process may be killed only."""


class FakeProbe:
    """Answers as its script says, the last answer for ever; an answer is None or an error."""

    def __init__(
        self,
        *script: ProbeError | None,
        done: tuple[int, ...] = (0,),
        load: ProbeError | None = None,
        after: Path | None = None,
    ) -> None:
        """No answer comes before the file `after` is there; by default the one that `RUNS` makes."""
        self.after = after
        self.script, self.counts, self.problem = list(script or [None]), list(done), load
        self.calls = self.loads = 0

    def __call__(self, timeout_s: float) -> None:
        if self.after and not self.after.exists():
            raise failed(busy=True)
        self.calls += 1
        answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if answer is not None:
            raise answer

    def done(self) -> int:
        return self.counts.pop(0) if len(self.counts) > 1 else self.counts[0]

    def load(self, timeout_s: float) -> None:
        self.loads += 1
        if self.problem is not None:
            raise self.problem

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a supervisor until it ends or the log says something; gives the log."""
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "TICK_S", 0.02)
    monkeypatch.setattr(watching_module, "TICK_S", 0.02)

    def start(
        script: str, probe: FakeProbe, until: str = "", stops: int = 1, act=None, reloads=None, **watching: float
    ) -> list[str]:
        probe.after = probe.after or tmp_path / "up"
        repository = Repository(tmp_path, "net", "plain", Signature(()), 0, "", "python")
        (repository.config.parent / "1").mkdir(parents=True, exist_ok=True)
        for path in (repository.config, repository.config.parent / "1" / "serve.json"):
            path.touch()
        launch = Launch("fake", "net", ["/bin/sh", "-c", script], {"DIR": str(tmp_path)}, repository=repository)
        times = Watching(**{"interval_s": 0.05, "timeout_s": 0.3, "start_s": 2.0, "drain_s": 1.0, **watching})
        asked, log = Signals(), []

        def tell(line: str) -> None:
            log.append(line)
            if "starting another" in line and "touch $DIR/up" in script:
                (tmp_path / "up").unlink(missing_ok=True)  # is for the next to make
            if until and until in line:
                for _ in range(stops):
                    asked.add()

        prefix = f"enginesmith_test_{os.getpid()}_"
        watch = Watch("net", asked, tell, None)
        made = Supervisor(launch, tmp_path, prefix, times, probe, NoJanitor(), asked, tell, watch, reloads)
        limit = threading.Timer(30, asked.add)  # a log that never says it must not hang the tests
        limit.start()
        start.log, start.asked = log, asked
        try:
            made.run(lambda: (tell("ready"), act and act()))
        finally:
            limit.cancel()
        assert any(until in line for line in log), log
        return log

    return start


def failed(reason: str = "INTERNAL: dead", **kind: bool) -> ProbeError:
    return ProbeError(reason, **kind)


def test_a_server_is_stopped_once_it_has_answered_all(run):
    log = run(RUNS, FakeProbe(), until="ready")
    assert log[:2] == ["ready", "stopping: takes no new requests, answers those in flight"]
    assert log[-1].startswith("stopped: all requests were answered, after ")


def test_it_is_ready_only_when_an_inference_has_answered(run):
    probe = FakeProbe(failed(busy=True), failed(busy=True), None)
    run(RUNS, probe, until="ready")
    assert probe.calls == 3


def test_a_server_that_dies_at_the_start_is_told_with_the_end_of_its_log(run):
    with pytest.raises(
        EngineError, match=r"did not start: the server \(process \d+\) ended with exit code 3"
    ) as failure:
        run("echo first; echo E1127 no such engine; exit 3", FakeProbe(failed()))
    assert failure.value.found == "the end of its log:\nfirst\nE1127 no such engine"
    assert failure.value.exit_code == 4


def test_a_server_that_never_answers_does_not_start(run):
    with pytest.raises(EngineError, match="the server did not start: INTERNAL: dead"):
        run(RUNS, FakeProbe(failed()), start_s=0.2)


def test_a_server_that_answers_wrongly_does_not_start(run):
    probe = FakeProbe(failed("output 'y' is 0.7 from the reference", wrong=True))
    with pytest.raises(EngineError, match=r"the server did not start: output 'y' is 0.7 from the reference"):
        run(RUNS, probe)
    assert probe.calls == 1


def test_a_server_that_dies_is_started_again(run):
    script = f"test -e $DIR/second && {{ {RUNS}; }}; touch $DIR/second $DIR/up; sleep 0.2; rm $DIR/up; kill -9 $$"
    log = run(script, FakeProbe(), until="recovered")
    assert [line for line in log if "ended with signal SIGKILL" in line]
    assert "starting another server in 0.0 s (1 of 5)" in log
    assert [line for line in log if line.startswith("recovered: a real inference answers again after ")]


def test_servers_that_die_again_and_again_are_given_up(run):
    with pytest.raises(EngineError, match="gave up: 6 servers in a row failed") as failure:
        run("touch $DIR/up; sleep 0.15; echo out of memory; exit 1", FakeProbe())
    assert sum("starting another server" in line for line in run.log) == 5
    assert "out of memory" in str(failure.value.found)


def test_a_model_that_fails_a_probe_is_loaded_again(run):
    probe = FakeProbe(None, failed(), None)
    log = run(RUNS, probe, until="recovered")
    assert "trouble: no right answer to a probe: INTERNAL: dead" in log
    assert probe.loads == 1
    assert not [line for line in log if "another server" in line]


def test_where_loading_again_fails_another_server_is_started(run):
    probe = FakeProbe(None, failed(), None, load=failed("no memory"))
    log = run(RUNS, probe, until="recovered")
    assert "trouble: the model could not be loaded again: no memory" in log
    assert "starting another server in 0.0 s (1 of 5)" in log


def test_a_model_process_that_dies_is_noticed_without_a_probe(run, tmp_path):
    pid_file = tmp_path / "model"

    def kill() -> None:
        os.kill(int(pid_file.read_text()), signal.SIGKILL)

    log = run(MODEL + RUNS, FakeProbe(after=pid_file), until="recovered", interval_s=60, act=kill)
    assert log[1] == f"trouble: process {int(pid_file.read_text())} of model 'net' died"


def test_a_full_queue_is_no_trouble_while_others_are_answered(run):
    probe = FakeProbe(None, failed("UNAVAILABLE: Exceeds maximum queue size", busy=True), None, done=(1, 1, 2))
    script = f"(sleep 0.8; echo E1127 enough) & {RUNS}"
    log = run(script, probe, until="enough")
    assert not [line for line in log if line.startswith("trouble")]
    assert probe.loads == 0


def test_a_full_queue_is_trouble_where_nobody_is_answered(run):
    probe = FakeProbe(None, failed("UNAVAILABLE: Exceeds maximum queue size", busy=True), None, done=(1,))
    log = run(RUNS, probe, until="recovered")
    assert "trouble: no right answer to a probe: UNAVAILABLE: Exceeds maximum queue size" in log


def test_a_server_that_does_not_answer_all_in_time_is_an_error(run, monkeypatch):
    monkeypatch.setattr(module, "HOUSEKEEPING_S", 0.1)
    with pytest.raises(EngineError, match=r"requests in flight got no answer within 0.2 s") as failure:
        run(DEAF, FakeProbe(), until="ready", drain_s=0.2)
    assert failure.value.hint == "give them longer with --drain-s"


def test_a_second_signal_stops_at_once(run):
    with pytest.raises(EngineError, match="stopped at once, as was asked for a second time"):
        run(DEAF, FakeProbe(), until="ready", stops=2, drain_s=60)


def test_a_signal_before_the_first_answer_stops_without_an_error(run):
    log = run(f"echo E1127 loading; {RUNS}", FakeProbe(failed(busy=True)), until="loading")
    assert log[-1] == "stopped before it answered its first request"


def test_errors_and_prints_of_the_server_are_told_and_routine_is_not(run):
    script = (
        "echo 'I1127 loading'; echo '+---+'; echo '| a |'; echo 'E1127 bad'; echo 'hello of the model'; "
        f"echo 'E1127 CudaDriverHelper has not been initialized.'; {RUNS}"
    )
    log = run(script, FakeProbe(), until="hello")
    told = [line for line in log if line.startswith("server:")]
    assert told[:2] == ["server: E1127 bad", "server: hello of the model"]


class FakeReloads:
    """Gives another probe, or an error."""

    def __init__(self, *outcomes: FakeProbe | Exception) -> None:
        self.outcomes = list(outcomes)

    def replaced(self, watch: Watch, old: FakeProbe) -> FakeProbe:
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def __str__(self) -> str:
        return "engine plain of net"


def test_after_a_reload_the_new_model_is_asked(run):
    old, new = FakeProbe(), FakeProbe()
    log = run(RUNS, old, until="reloaded", act=lambda: run.asked.add_reload(), interval_s=60, reloads=FakeReloads(new))
    assert log[1].startswith("reloaded: engine plain of net answers after ")
    assert (old.calls, new.calls) == (1, 0)
    new = FakeProbe(failed(), None)
    log = run(RUNS, old, until="recovered", act=lambda: run.asked.add_reload(), reloads=FakeReloads(new))
    assert "trouble: no right answer to a probe: INTERNAL: dead" in log
    assert new.loads == 1


def test_what_cannot_be_reloaded_is_told_in_a_line_and_changes_nothing(run):
    probe = FakeProbe()
    refused = UsageError("net is not a bundle", expected="a folder")
    log = run(RUNS, probe, until="not reloaded", act=lambda: run.asked.add_reload(), reloads=FakeReloads(refused))
    assert "not reloaded, what was served goes on: net is not a bundle expected: a folder" in log
    assert probe.loads == 0


def test_trouble_during_a_reload_is_healed_and_the_reload_is_not_made(run):
    trouble = TroubleError("process 1 of model 'net' died", alive=True)
    probe = FakeProbe()
    log = run(RUNS, probe, until="recovered", act=lambda: run.asked.add_reload(), reloads=FakeReloads(trouble))
    assert log[1:3] == [
        "not reloaded: there was trouble meanwhile; ask again once it has recovered",
        "trouble: process 1 of model 'net' died",
    ]
    assert probe.loads == 1


def test_a_server_that_loads_no_model_beside_another_is_not_reloaded(run):
    log = run(RUNS, FakeProbe(), until="not reloaded", act=lambda: run.asked.add_reload())
    assert log[1].endswith("goes on: fake loads no model beside another: stop it and start it again")


def test_no_process_outlives_the_supervisor(run, tmp_path):
    run(MODEL.replace("$!", "$! $$") + RUNS, FakeProbe(after=tmp_path / "model"), until="ready")
    pids = [int(pid) for pid in (tmp_path / "model").read_text().split()]
    assert len(pids) == 2
    alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    assert alive == []


def test_a_model_that_a_dead_server_was_loading_is_ended_too(run, tmp_path):
    stub = STUB.replace("$DIR", str(tmp_path))
    shutil.copy("/bin/sh", stub)
    loads = f"{stub} -c 'sleep 30; :' enginesmith_test_{os.getpid()}_1"
    script = f"{loads} & echo $! > $DIR/new; mv $DIR/new $DIR/loading; {RUNS}"

    def die() -> None:
        while not (tmp_path / "loading").exists():
            time.sleep(0.01)
        child = psutil.Process(int((tmp_path / "loading").read_text()))
        child.parent().kill()

    log = run(f"test -e $DIR/loading || {{ {script}; }}; {RUNS}", FakeProbe(), until="recovered", act=die)
    pid = int((tmp_path / "loading").read_text())
    assert [line for line in log if "ended with signal SIGKILL" in line]
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_server_that_dies_during_a_reload_is_trouble(run):
    class Killing:
        def replaced(self, watch: Watch, old: FakeProbe) -> FakeProbe:
            os.kill(watch.server.pid, signal.SIGKILL)
            while watch.server.code is None:
                time.sleep(0.01)
            raise failed("UNAVAILABLE: Socket closed")

    script = f"test -e $DIR/second && {{ {RUNS}; }}; touch $DIR/second; {RUNS}"
    log = run(script, FakeProbe(), until="recovered", act=lambda: run.asked.add_reload(), reloads=Killing())
    assert log[1] == "not reloaded: there was trouble meanwhile; ask again once it has recovered"
    assert "ended with signal SIGKILL" in log[2]


def test_the_log_is_cut_before_it_fills_the_disk(tmp_path, monkeypatch):
    from enginesmith.serving import server

    monkeypatch.setattr(server, "MAX_LOG_BYTES", 100)
    log = tmp_path / "log"
    script = "for i in 1 2 3 4 5 6 7 8 9; do echo line number $i of this log; sleep 0.1; done; sleep 30"
    made = server.Server(["/bin/sh", "-c", script], {}, log, "enginesmith_test_")
    seen: list[str] = []
    deadline = time.monotonic() + 10
    while len(seen) < 9 and time.monotonic() < deadline:
        made.read_log(seen.append)
    made.read_log()
    made.kill()
    assert seen[-1] == "line number 9 of this log"
    assert log.stat().st_size < 100
    assert isinstance(log, Path)
