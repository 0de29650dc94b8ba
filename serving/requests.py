"""Requests by their ids in the log, with the time that each spent in the queue and in the model.

The server traces one in N requests and writes each trace to a file of its own, which is read, told and removed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .probe import PROBE_ID


class RequestLog:
    """Traces of a server.

    Args:
        folder: an existing, empty one.
        every: one in as many requests is traced.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self._folder = folder
        self._every = every

    def flags(self) -> list[str]:
        """What the server is to be told."""
        settings = ["mode=triton", f"triton,file={self._folder / 'trace'}", "triton,log-frequency=1"]
        settings += [f"rate={self._every}", "level=TIMESTAMPS"]
        return [part for setting in settings for part in ("--trace-config", setting)]

    def read(self, tell: Callable[[str], None]) -> None:
        """Tells what was traced since, in order."""
        for path in sorted(self._folder.glob("trace.*"), key=lambda path: int(path.suffix[1:])):
            try:
                events = json.loads(path.read_text())
            except ValueError:
                return  # being written
            path.unlink()
            for line in described(events):
                tell(line)


def described(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each request of a trace; probes are left out."""
    names: dict[int, str] = {}
    times: dict[int, dict[str, int]] = {}
    for event in events:
        if "request_id" in event or "model_name" in event:
            names[event["id"]] = event.get("request_id") or "without an id"
        for stamp in event.get("timestamps", ()):
            times.setdefault(event["id"], {})[stamp["name"]] = stamp["ns"]
    told = {key: name for key, name in names.items() if not name.startswith(PROBE_ID)}
    return [f"request {name}: {_spent(times.get(key, {}))}" for key, name in told.items()]


def _spent(at: Mapping[str, int]) -> str:
    if not {"REQUEST_START", "REQUEST_END"} <= at.keys():
        return "no times"
    total = f"{_ms(at, 'REQUEST_START', 'REQUEST_END')} ms"
    if not {"QUEUE_START", "COMPUTE_START", "COMPUTE_END"} <= at.keys():
        return f"{total}, without reaching the model"
    queued, computed = _ms(at, "QUEUE_START", "COMPUTE_START"), _ms(at, "COMPUTE_START", "COMPUTE_END")
    return f"{total}, of which {queued} in the queue, {computed} in the model"


def _ms(at: Mapping[str, int], start: str, end: str) -> str:
    return f"{(at[end] - at[start]) / 1e6:.2f}"
