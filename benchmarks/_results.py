"""Writes what a benchmark found, with the machine, the versions and the command, to benchmarks/results/<name>.json."""

from __future__ import annotations

import json
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from enginesmith.compiler.machine.environment import environment

RESULTS = Path(__file__).parent / "results"


def command() -> str:
    """The command line, as it is given from the root of the repository; where its results went is left out.

    Where peers are installed stands as benchmarks/README.md names it.
    """
    arguments = sys.argv[1:]
    if "--out" in arguments:
        index = arguments.index("--out")
        arguments = arguments[:index] + arguments[index + 2 :]
    for option, named in (
        ("--modelopt-python", "modelopt/bin/python"),
        ("--nncf-python", "nncf/bin/python"),
        ("--torch-pruning", "torch-pruning"),
    ):
        if option in arguments:
            arguments[arguments.index(option) + 1] = named
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def write(name: str, results: Any, path: Path | None = None) -> Path:
    """Writes `results` under `name`, or to `path`, and says where."""
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": name,
        "command": command(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "results": results,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path}")
    return path
