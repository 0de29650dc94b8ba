"""How long `enginesmith --help`, `import enginesmith` and opening a package of TorchInductor take, in fresh processes.

The package holds one small layer. It is opened and called by torch's own `aoti_load_package` too, in turns.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _results import write

RUNS = 9
HELP_LIMIT_S = 0.3
IMPORT_LIMIT_S = 0.1
IMPORT = "import time; start = time.perf_counter(); import enginesmith; print(time.perf_counter() - start)"

OPEN = """
import pathlib, sys, time, torch
start = time.perf_counter()
{how}
opened = time.perf_counter() - start
x = torch.ones(1, 16)
with torch.no_grad():
    for _ in range(1000):
        package(x)
    start = time.perf_counter()
    for _ in range(10_000):
        package(x)
print(opened, (time.perf_counter() - start) / 10_000 * 1e6)
"""
WAYS = {
    "ours": "from enginesmith.targets.inductor.package import Package; package = Package(pathlib.Path(sys.argv[1]))",
    "torch": "package = torch._inductor.aoti_load_package(sys.argv[1])",
}


def process_s(*arguments: str) -> float:
    """Seconds of a whole Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def import_s() -> float:
    """Seconds of the import alone."""
    return float(subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True).stdout)


def opened(package: Path, how: str) -> tuple[float, float]:
    """Seconds of opening a package, and microseconds of a call."""
    code = OPEN.format(how=WAYS[how])
    done = subprocess.run([sys.executable, "-c", code, str(package)], check=True, capture_output=True, text=True)
    seconds, microseconds = map(float, done.stdout.split())
    return seconds, microseconds


def packages() -> dict[str, dict[str, float]]:
    """What `opened` gives for both ways, in turns; the medians."""
    import torch

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        package = Path(folder) / "layer.pt2"
        program = torch.export.export(torch.nn.Linear(16, 16).eval(), (torch.ones(1, 16),))
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        rounds = [{how: opened(package, how) for how in WAYS} for _ in range(RUNS)]
    return {
        how: dict(
            zip(("open_s", "call_us"), map(statistics.median, zip(*(r[how] for r in rounds), strict=True)), strict=True)
        )
        for how in WAYS
    }


def main() -> int:
    process_s("-m", "enginesmith", "--help")  # fills the file cache and writes the byte code
    rounds = [(process_s("-c", ""), process_s("-m", "enginesmith", "--help"), import_s()) for _ in range(RUNS)]
    python_s, help_s, imported_s = map(statistics.median, zip(*rounds, strict=True))
    results: dict[str, Any] = {
        "runs": RUNS,
        "python_s": python_s,
        "help_s": help_s,
        "help_limit_s": HELP_LIMIT_S,
        "import_s": imported_s,
        "import_limit_s": IMPORT_LIMIT_S,
    }
    print(f"enginesmith --help  {help_s:.3f} s (limit {HELP_LIMIT_S}; python alone {python_s:.3f})")
    print(f"import enginesmith  {imported_s:.3f} s (limit {IMPORT_LIMIT_S})")
    for how, found in packages().items():
        results[f"package_{how}"] = found
        print(f"a package, {how:5}    {found['open_s']:.3f} s to open, {found['call_us']:.1f} us a call")
    write("startup", results)
    return 0 if help_s < HELP_LIMIT_S and imported_s < IMPORT_LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main())
