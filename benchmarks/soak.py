"""Serves a bundle under load for minutes: no wrong answer, and no growth of memory or file handles.

    python benchmarks/soak.py build/digits --minutes 10

Recorded samples of the bundle are sent by several clients in closed loops; every answer is compared with the record of
the reference, as far from it as validation found at most twice. Memory and handles of the supervisor, the server and
the model's processes are read every second; growth is the median of the last quarter over that of the second, the first
being warm-up. Exit code 1 where an answer was wrong or missing, or something grew.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc as triton
from _results import write
from _served import served
from tritonclient.utils import InferenceServerException

from enginesmith.compiler.engine import ranked, read_manifest
from enginesmith.compiler.signature import Signature
from enginesmith.compiler.validation.reference import Recorded, ReferenceOutputs
from enginesmith.serving.probe import difference, limit_of
from enginesmith.serving.wire import infer_input

GROWTH_MB, GROWTH_SHARE, GROWTH_HANDLES = 8.0, 0.05, 4


class Client(threading.Thread):
    """Sends one request after the other; `latencies_s` has one number for each right answer."""

    def __init__(self, url: str, model: str, samples: list[Recorded], limit: float, seed: int, stop: threading.Event):
        super().__init__(daemon=True)
        self._client, self._model, self._samples, self._limit = triton.InferenceServerClient(url), model, samples, limit
        self._random, self._stop_asked = np.random.default_rng(seed), stop
        self.latencies_s: list[float] = []
        self.wrong: list[str] = []
        self.errors: list[str] = []

    def run(self) -> None:
        inputs = [[infer_input(name, array) for name, array in s.inputs.items()] for s in self._samples]
        while not self._stop_asked.is_set():
            number = int(self._random.integers(len(self._samples)))
            began = time.perf_counter()
            try:
                result = self._client.infer(self._model, inputs[number], client_timeout=60)
            except InferenceServerException as error:
                self.errors.append(error.message())
                time.sleep(0.1)
                continue
            self.latencies_s.append(time.perf_counter() - began)
            sample = self._samples[number]
            problem = difference(sample.outputs, {name: result.as_numpy(name) for name in sample.outputs}, self._limit)
            if problem:
                self.wrong.append(problem)


def processes(supervisor: psutil.Process) -> Iterator[tuple[str, psutil.Process]]:
    """The supervisor, the server and the models, by role."""
    yield "supervisor", supervisor
    server = next(child for child in supervisor.children() if child.name() == "tritonserver")
    yield "server", server
    for number, child in enumerate(server.children()):
        yield f"model {number}", child


def growth(values: list[float]) -> float:
    quarter = len(values) // 4
    return statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    manifest = read_manifest(options.bundle)
    record = ranked(manifest)[0]
    samples = list(ReferenceOutputs(options.bundle / "reference", Signature.from_json(manifest["signature"])))
    stop = threading.Event()
    limit = limit_of(record)
    with served(options.bundle, "--engine", record["name"]) as (process, info):
        clients = [Client(info["grpc"], info["model"], samples, limit, n, stop) for n in range(options.clients)]
        watched = dict(processes(psutil.Process(process.pid)))
        seen: dict[str, dict[str, list[float]]] = {role: {"rss_mb": [], "handles": []} for role in watched}
        for client in clients:
            client.start()
        began = time.monotonic()
        while time.monotonic() < began + 60 * options.minutes:
            time.sleep(1)
            for role, watching in watched.items():
                seen[role]["rss_mb"].append(watching.memory_info().rss / 1e6)
                seen[role]["handles"].append(watching.num_fds())
        took_s = time.monotonic() - began
        stop.set()
        for client in clients:
            client.join(timeout=90)
    code = process.returncode

    latencies_ms = np.array([1e3 * s for client in clients for s in client.latencies_s])
    found: dict[str, Any] = {
        "minutes": round(took_s / 60, 2),
        "engine": record["name"],
        "server": info["server"],
        "clients": options.clients,
        "answers": len(latencies_ms),
        "answers_per_s": round(len(latencies_ms) / took_s, 1),
        "p50_ms": round(float(np.percentile(latencies_ms, 50)), 3),
        "p99_ms": round(float(np.percentile(latencies_ms, 99)), 3),
        "wrong": sum(len(client.wrong) for client in clients),
        "errors": sum(len(client.errors) for client in clients),
        "exit_code": code,
        "processes": {
            role: {
                "rss_mb": [round(values["rss_mb"][i], 1) for i in (0, len(values["rss_mb"]) // 2, -1)],
                "handles": [values["handles"][i] for i in (0, len(values["handles"]) // 2, -1)],
                "growth_mb": round(growth(values["rss_mb"]), 2),
                "growth_handles": growth(values["handles"]),
            }
            for role, values in seen.items()
        },
    }
    problems = [f"{found[name]} {name}" for name in ("wrong", "errors", "exit_code") if found[name]]
    for role, values in found["processes"].items():
        allowed_mb = max(GROWTH_MB, GROWTH_SHARE * values["rss_mb"][0])
        if values["growth_mb"] > allowed_mb or values["growth_handles"] > GROWTH_HANDLES:
            problems.append(f"{role} grew by {values['growth_mb']} MB and {values['growth_handles']} handles")
    found["problems"] = problems
    print(json.dumps(found, indent=1))
    write("soak", found, options.out)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
