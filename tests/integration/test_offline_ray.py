"""`enginesmith run --ray`, where Ray is installed: the extra `[ray]` is too large for the tests that all run."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray.data", reason="needs the extra [ray]")

offline = runpy.run_path(str(Path(__file__).parents[1] / "offline_case.py"))
rows, write_own_bundle = offline["rows"], offline["write_own_bundle"]
pytestmark = pytest.mark.slow
ROWS = 203


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> tuple[Path, list[str], Path]:
    """A folder, the command without --out, and the folder of the engine's flags; `whole` was run without Ray."""
    folder = tmp_path_factory.mktemp("ray")
    bundle, target, flags = write_own_bundle(folder)
    np.save(folder / "x.npy", rows(ROWS))
    command = [
        sys.executable, "-m", "enginesmith", "run", str(bundle), "--data", str(folder / "x.npy"),
        "--target", target, "--shard-rows", "20",
    ]  # fmt: skip
    subprocess.run([*command, "--out", folder / "whole"], check=True, capture_output=True)
    return folder, command, flags


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def test_an_actor_that_dies_loses_no_rows_and_the_rest_can_be_gone_on_with(case):
    folder, command, flags = case
    out = folder / "out"
    subprocess.run([*command, "--out", out, "--ray"], check=True, capture_output=True)
    assert shards(out) == shards(folder / "whole")
    record = json.loads((out / "manifest.json").read_text())
    assert record["shards"] == json.loads((folder / "whole" / "manifest.json").read_text())["shards"]
    (out / "shard-00000002.npz").unlink()
    (out / "shard-00000005.npz").unlink()
    (flags / "die").touch()
    run = subprocess.run([*command, "--out", out, "--ray", "--json"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not (flags / "die").exists()
    assert json.loads(run.stdout)["new_rows"] == 40
    assert shards(out) == shards(folder / "whole")


def test_a_shard_that_always_kills_its_actor_ends_the_run(case):
    folder, command, flags = case
    (flags / "always").touch()
    run = subprocess.run([*command, "--out", folder / "dead", "--ray"], capture_output=True, text=True)
    (flags / "always").unlink()
    assert run.returncode == 4
    assert "failed 3 times: the process that ran it died each time" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_function_is_refused_as_actors_cannot_share_it(case):
    folder, command, _ = case
    (folder / "give.py").write_text("def give():\n  yield {}\n")
    function = [text if text != str(folder / "x.npy") else f"{folder / 'give.py'}:give" for text in command]
    run = subprocess.run([*function, "--out", folder / "f", "--ray"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "can only be read from the beginning on" in run.stderr
