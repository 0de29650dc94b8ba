from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys

from enginesmith.serving.signals import collected

SCRIPT = """
import sys, time
from enginesmith.serving.signals import collected
with collected() as asked:
    print("ready", flush=True)
    while not (asked.count or asked.reload):
        time.sleep(0.01)
    open(sys.argv[1], "w").write(f"{asked.count} {asked.reload}")
"""


def test_stops_are_counted_and_a_reload_is_noted():
    before = signal.getsignal(signal.SIGHUP)
    with collected() as asked:
        signal.raise_signal(signal.SIGHUP)
        assert (asked.count, asked.reload) == (0, True)
        assert not asked.wait(0)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert asked.count == 2
        assert asked.wait(0)
    assert signal.getsignal(signal.SIGHUP) is before


def test_a_process_whose_terminal_is_gone_stops(tmp_path):
    assert _on_a_terminal(tmp_path / "said", hang_up=True) == "1 False"
    assert _on_a_terminal(tmp_path / "said", hang_up=False) == "0 True"


def _on_a_terminal(said, *, hang_up: bool) -> str:
    """What a process notes whose terminal is closed, or that is sent SIGHUP while it has it."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)" + SCRIPT, said]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, text=True
    )
    os.close(theirs)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()
    if not hang_up:
        process.send_signal(signal.SIGHUP)
        process.wait(30)
    os.close(ours)
    process.communicate(timeout=30)
    return said.read_text()
