from __future__ import annotations

import runpy
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVER = Path(__file__).with_name("forked.py")


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for PATH with an `enginesmith` that need not import anything, see forked.py."""
    folder = tmp_path_factory.mktemp("commands")
    path = folder / "enginesmith"
    path.write_text(runpy.run_path(str(SERVER))["COMMAND"].format(socket=str(folder / "socket")))
    path.chmod(stat.S_IRWXU)
    with subprocess.Popen(
        [sys.executable, str(SERVER), str(folder / "socket")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield folder
        server.stdin.close()
