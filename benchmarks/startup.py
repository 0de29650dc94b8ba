"""How long `enginesmith --help` and `import enginesmith` take, in fresh processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from _results import write

RUNS = 9
HELP_LIMIT_S = 0.3
IMPORT_LIMIT_S = 0.1
IMPORT = "import time; start = time.perf_counter(); import enginesmith; print(time.perf_counter() - start)"


def process_s(*arguments: str) -> float:
    """Seconds of a whole Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def import_s() -> float:
    """Seconds of the import alone."""
    return float(subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True).stdout)


def main() -> int:
    process_s("-m", "enginesmith", "--help")  # fills the file cache and writes the byte code
    rounds = [(process_s("-c", ""), process_s("-m", "enginesmith", "--help"), import_s()) for _ in range(RUNS)]
    python_s, help_s, imported_s = map(statistics.median, zip(*rounds, strict=True))
    results = {
        "runs": RUNS,
        "python_s": python_s,
        "help_s": help_s,
        "help_limit_s": HELP_LIMIT_S,
        "import_s": imported_s,
        "import_limit_s": IMPORT_LIMIT_S,
    }
    print(f"enginesmith --help  {help_s:.3f} s (limit {HELP_LIMIT_S}; python alone {python_s:.3f})")
    print(f"import enginesmith  {imported_s:.3f} s (limit {IMPORT_LIMIT_S})")
    write("startup", results)
    return 0 if help_s < HELP_LIMIT_S and imported_s < IMPORT_LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main())
