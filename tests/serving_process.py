"""`enginesmith serve` as a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil


class Served:
    """Starts it, and waits until it says that it answers."""

    def __init__(self, bundle: Path, folder: Path, *options: str) -> None:
        self.errors = folder / "serve.log"
        command = [sys.executable, "-m", "enginesmith", "serve", str(bundle), "--port", "0", "--metrics-port", "0"]
        with self.errors.open("wb") as log:
            self.process = subprocess.Popen([*command, "--json", *options], stdout=subprocess.PIPE, stderr=log)
        assert self.process.stdout is not None
        text = ""
        while line := self.process.stdout.readline().decode():
            text += line
            if line == "}\n":
                break
        else:
            raise AssertionError(f"it ended with {self.process.wait()}:\n{self.log()}")
        self.info: dict[str, Any] = json.loads(text)
        self.url: str = self.info["grpc"]
        self.model: str = self.info["model"]

    def log(self) -> str:
        return self.errors.read_text()

    def wait_for_log(self, text: str, count: int = 1, seconds: float = 60) -> str:
        """Waits until the text stands in so many lines, and gives the last of them."""
        deadline = time.monotonic() + seconds
        while len(found := [line for line in self.log().splitlines() if text in line]) < count:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)
        return found[-1]

    def server(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if child.name() == "tritonserver")

    def fallback(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if "enginesmith.serving.fallback" in " ".join(child.cmdline()))

    def models(self) -> list[psutil.Process]:
        return [c for c in self.server().children() if c.status() != psutil.STATUS_ZOMBIE]

    def leftovers(self) -> list[str]:
        """What it left behind: folders, shared memory, processes."""
        prefix = f"enginesmith_{self.process.pid}_"
        found = [str(path) for path in Path(tempfile.gettempdir()).glob(f"enginesmith-serve-{self.process.pid}-*")]
        found += [str(path) for path in Path("/dev/shm").glob(f"{prefix}*")]
        for process in psutil.process_iter(["pid", "cmdline"]):
            line = " ".join(process.info["cmdline"] or ())
            if prefix in line or f"enginesmith-serve-{self.process.pid}-" in line:
                found.append(f"{process.info['pid']}: {line}")
        return found

    def end(self) -> int:
        """Has it stop, however it is."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
