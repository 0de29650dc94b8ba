"""`enginesmith serve` as a process of its own, for benchmarks of it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def served(bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The process, once the server answers, and what it says of itself; it is told to stop at the end."""
    words = [sys.executable, "-m", "enginesmith", "serve", str(bundle), "--port", "0", "--metrics-port", "0", "--json"]
    process = subprocess.Popen([*words, *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if line == "}\n":
            break
    try:
        yield process, json.loads(text)
    finally:
        process.terminate()
        process.wait(timeout=90)


def loaded(bundle: Path, serve: Sequence[str], load: Sequence[str]) -> dict[str, Any]:
    """What the only closed loop of a load test found, with these options of both commands; all answers are checked."""
    with served(bundle, *serve) as (_, info):
        words = [sys.executable, "-m", "enginesmith", "load-test", info["grpc"], "--bundle", str(bundle), "--json"]
        answer = subprocess.run([*words, *load], capture_output=True, text=True, check=True).stdout
    (loop,) = json.loads(answer)["closed"]
    return dict(loop)
