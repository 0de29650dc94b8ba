"""`enginesmith run`: right, in order, and the same whatever happened to it on the way."""

from __future__ import annotations

import functools
import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from enginesmith.offline.results import Outputs

offline = runpy.run_path(str(Path(__file__).parents[1] / "offline_case.py"))
rows, write_own_bundle = offline["rows"], offline["write_own_bundle"]
network, signature, write_bundle = (offline["small"][name] for name in ("network", "signature", "write_bundle"))

ROWS = 203


@pytest.fixture
def case(tmp_path) -> Path:
    """A folder with a bundle and x.npy."""
    write_bundle(tmp_path / "bundle")
    np.save(tmp_path / "x.npy", rows(ROWS))
    return tmp_path


@pytest.fixture
def run(enginesmith, case):
    """Runs the command on the folder's bundle."""

    def call(*arguments: object, data: str = "x.npy", out: str = "out", bundle: str = "bundle"):
        return enginesmith("run", case / bundle, "--data", case / data, "--out", case / out, *arguments)

    return call


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def check(folder: Path, x: np.ndarray) -> None:
    outputs = Outputs.open(folder)
    for name, expected in network(x).items():
        np.testing.assert_allclose(outputs[name], expected, rtol=1e-6, atol=1e-6)


def test_rows_come_out_in_order_and_a_second_run_has_nothing_to_do(run, case):
    outcome = run("--shard-rows", 50, "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["new_rows"] == ROWS
    check(case / "out", rows(ROWS))
    record = manifest(case / "out")
    assert [(s["first_row"], s["rows"]) for s in record["shards"]] == [
        (0, 50),
        (50, 50),
        (100, 50),
        (150, 50),
        (200, 3),
    ]
    before = {path: path.stat().st_mtime_ns for path in (case / "out").iterdir()}
    outcome = run("--shard-rows", 50)
    assert (outcome.code, "all 203 rows were there already" in outcome.out) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in (case / "out").iterdir()} == before
    assert sorted(path.name for path in (case / "out").iterdir()) == ["manifest.json", *shards(case / "out")]


def test_all_kinds_of_data_give_the_same(run, case):
    x = rows(ROWS)
    np.savez(case / "x.npz", x=x, label=np.arange(ROWS))
    np.savez_compressed(case / "packed.npz", x=x)
    np.save(case / "fortran.npy", np.asfortranarray(x))
    with (case / "x.jsonl").open("w") as stream:
        stream.writelines(json.dumps({"x": row.tolist()}) + "\n" for row in x)
    (case / "folder").mkdir()
    for start in range(0, ROWS, 7):
        np.save(case / "folder" / f"{start:05d}.npy", x[start : start + 7])
    (case / "give.py").write_text(
        f"import numpy as np\ndef give():\n  x = np.load({str(case / 'x.npy')!r})\n"
        f"  for start in range(0, {ROWS}, 9): yield {{'x': x[start : start + 9]}}\n"
    )
    assert run("--shard-rows", 50).code == 0
    expected = shards(case / "out")
    kinds = ("x.npz", "packed.npz", "fortran.npy", "x.jsonl", "folder", "folder/*.npy", "give.py:give")
    for number, data in enumerate(kinds):
        outcome = run("--shard-rows", 50, data=data, out=f"out{number}")
        assert outcome.code == 0, outcome.err
        assert shards(case / f"out{number}") == expected, data


def test_chosen_outputs_and_kept_arrays_are_written(run, case):
    np.savez(case / "x.npz", x=rows(ROWS), name=np.array([f"row {i}" for i in range(ROWS)]))
    assert run("--only", "right", "--keep", "name", data="x.npz").code == 0
    outputs = Outputs.open(case / "out")
    assert set(next(iter(outputs))) == {"right", "name"}
    assert outputs["name"][[0, 202]].tolist() == ["row 0", "row 202"]


def test_an_engine_of_a_fixed_batch_gets_padded_batches(run, case):
    shutil.rmtree(case / "bundle")
    write_bundle(case / "bundle", described=signature(4, 4, 4))
    assert run().code == 0
    check(case / "out", rows(ROWS))


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path):
    bundle, target, flags = write_own_bundle(tmp_path)
    np.save(tmp_path / "x.npy", rows(ROWS))
    command = [
        sys.executable, "-m", "enginesmith", "run", bundle, "--data", tmp_path / "x.npy", "--target", target,
        "--shard-rows", "20",
    ]  # fmt: skip
    subprocess.run([*command, "--out", tmp_path / "whole"], check=True, capture_output=True)
    (flags / "slow").touch()
    process = subprocess.Popen([*command, "--out", tmp_path / "out"], stderr=subprocess.PIPE)
    wait_for(tmp_path / "out" / "shard-00000002.npz")
    process.kill()
    process.communicate()
    (flags / "slow").unlink()
    (flags / "calls").unlink()
    there = len(shards(tmp_path / "out"))
    assert 3 <= there < 11
    assert manifest(tmp_path / "out")["complete"] is False
    subprocess.run([*command, "--out", tmp_path / "out"], check=True, capture_output=True)
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    assert manifest(tmp_path / "out")["shards"] == manifest(tmp_path / "whole")["shards"]
    calls = (flags / "calls").read_text().split()
    assert len(calls) <= 1 + (11 - there + 1) * 5  # one to look at the outputs, and none for what was there


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_what_can_be_gone_on_with(tmp_path, number, code):
    bundle, target, flags = write_own_bundle(tmp_path)
    np.save(tmp_path / "x.npy", rows(ROWS))
    (flags / "slow").touch()
    command = [
        sys.executable, "-m", "enginesmith", "run", bundle, "--data", tmp_path / "x.npy", "--target", target,
        "--shard-rows", "20", "--out", tmp_path / "out",
    ]  # fmt: skip
    listening = functools.partial(signal.signal, number, signal.SIG_DFL)  # what runs in the background ignores SIGINT
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listening)
    wait_for(tmp_path / "out" / "shard-00000001.npz")
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == code
    assert "stopped; the same command goes on where it was" in err
    assert "Traceback" not in err
    assert not list((tmp_path / "out").glob("*.partial"))
    (flags / "slow").unlink()
    subprocess.run(command, check=True, capture_output=True)
    check(tmp_path / "out", rows(ROWS))


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.005)


def unfinished(case: Path) -> None:
    """Takes the record back to where two shards are there."""
    record = manifest(case / "out")
    lines = [json.dumps(shard) + "\n" for shard in record["shards"][:2]]
    (case / "out" / "shards.jsonl").write_text("".join(lines) + lines[0][:20])
    (case / "out" / "manifest.json").write_text(json.dumps({**record, "complete": False, "shards": []}))


@pytest.mark.parametrize("finished", [True, False])
def test_another_bundle_engine_or_data_is_refused(run, case, finished):
    assert run("--shard-rows", 50).code == 0
    if not finished:
        unfinished(case)
    before = shards(case / "out")
    write_bundle(case / "other", {"plain": "", "second": ""})
    np.save(case / "y.npy", rows(ROWS) + 1)
    for message, outcome in {
        "was begun with another bundle": run(bundle="other"),
        "was begun with another engine": run("--engine", "second"),
        "was begun with other data": run(data="y.npy"),
        "was begun with another --batch": run("--batch", 8),
        "was begun with another --shard-rows": run("--shard-rows", 51),
        "was begun with other outputs (--only)": run("--only", "left"),
    }.items():
        assert outcome.code == 2
        assert f"{str(case / 'out')!r} {message}" in outcome.err
        assert "--restart begins anew" in outcome.err
    assert shards(case / "out") == before
    assert run("--restart", "--shard-rows", 100, data="y.npy").code == 0
    assert len(shards(case / "out")) == 3
    check(case / "out", rows(ROWS) + 1)


def test_shards_that_are_gone_or_cut_off_are_run_again(run, case):
    assert run("--shard-rows", 50).code == 0
    expected = shards(case / "out")
    (case / "out" / "shard-00000001.npz").unlink()
    (case / "out" / "shard-00000003.npz").write_bytes(b"cut")
    outcome = run("--json")
    assert (outcome.code, json.loads(outcome.out)["new_rows"]) == (0, 100)
    assert shards(case / "out") == expected


def test_a_function_that_gives_other_rows_the_second_time_is_found(run, case):
    text = "import numpy as np\ndef give():\n  for i in range(50): yield {'x': np.full((4, 4), i + START, 'float32')}\n"
    (case / "give.py").write_text(text.replace("START", f"len(open({str(case / 'n')!r}).read())"))
    (case / "n").write_text("")
    assert run("--shard-rows", 40, data="give.py:give").code == 0
    unfinished(case)
    assert run("--shard-rows", 40, data="give.py:give").code == 0
    unfinished(case)
    (case / "n").write_text("x")
    outcome = run("--shard-rows", 40, data="give.py:give")
    assert outcome.code == 2
    assert "gives other rows than when this run began (shard 0)" in outcome.err


def test_bad_rows_are_named_and_leave_their_neighbours_alone(run, case):
    x = rows(ROWS)
    x[17, 2] = np.nan
    x[18, 0] = np.inf
    np.save(case / "x.npy", x)
    outcome = run()
    assert outcome.code == 2
    assert f"{case / 'x.npy'}, row 17: input 'x' holds NaN or Inf" in outcome.err
    outcome = run("--bad-rows", "skip", "--json")
    result = json.loads(outcome.out)
    assert (outcome.code, result["failed_rows"], result["nan_rows"]) == (1, 2, 0)
    reason = "input 'x' holds NaN or Inf"
    assert result["failed"] == [{"file": str(case / "x.npy"), "rows": [17, 19], "reason": reason}]
    left = Outputs.open(case / "out")["left"]
    assert np.isnan(left).any(axis=1).nonzero()[0].tolist() == [17, 18]
    good = np.delete(np.arange(ROWS), [17, 18])
    np.testing.assert_allclose(left[good], network(x[good])["left"], rtol=1e-6, atol=1e-6)
    assert run("--bad-rows", "skip").code == 1
    outcome = run("--bad-rows", "run", "--restart", "--json")
    assert (outcome.code, json.loads(outcome.out)["nan_rows"]) == (0, 1)  # of Inf it makes 1, and Inf


def test_a_file_of_another_shape_is_named_before_anything_runs(run, case):
    (case / "folder").mkdir()
    np.save(case / "folder" / "a.npy", rows(10))
    np.save(case / "folder" / "b.npy", np.zeros((6, 5), np.float32))
    np.save(case / "folder" / "c.npy", rows(10))
    outcome = run(data="folder")
    assert outcome.code == 2
    assert f"{case / 'folder' / 'b.npy'}: input 'x' has the wrong shape" in outcome.err
    assert not (case / "out").exists()
    outcome = run("--bad-rows", "skip", "--json", data="folder")
    assert (outcome.code, json.loads(outcome.out)["failed_rows"]) == (1, 6)
    left = Outputs.open(case / "out")["left"]
    assert np.isnan(left).all(axis=1).nonzero()[0].tolist() == list(range(10, 16))


def test_lines_that_are_no_rows_are_named(run, case):
    lines = ['{"x": [1, 2, 3, 4]}', "", '{"x": [1, 2, 3]}', "no", '{"y": 1}', '{"x": [1, 2, 3, "a"]}']
    (case / "x.jsonl").write_text("\n".join(lines))
    outcome = run("--bad-rows", "skip", "--json", data="x.jsonl")
    reasons = [failure["reason"].partition(":")[0] for failure in json.loads(outcome.out)["failed"]]
    assert reasons == ["'x' has the shape (3,) and not (4,)", "no JSON", "'x' is missing", "'x' is not of float32"]


def test_a_full_disk_leaves_whole_shards_and_goes_on_later(run, case):
    assert run("--shard-rows", 50, out="whole").code == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    np.save(case / "x.npy", rows(ROWS))
    sizes = [path.stat().st_size for path in (case / "whole").glob("shard-*")]
    (case / "out").mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) - 1, limits[1]))
    try:
        outcome = run("--shard-rows", 50)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert outcome.code == 4
    assert f"no space left for shard 0 of {str(case / 'out')!r}" in outcome.err
    assert not list((case / "out").glob("*.partial")) + list((case / "out").glob("shard-*.npz"))
    assert run("--shard-rows", 50).code == 0
    assert shards(case / "out") == shards(case / "whole")


def test_foreign_folders_are_left_alone(run, case):
    (case / "out").mkdir()
    (case / "out" / "thesis.txt").write_text("mine")
    for arguments in ((), ("--restart",)):
        outcome = run(*arguments)
        assert outcome.code == 2
        assert "holds something else than the outputs of a run" in outcome.err
    outcome = run("--restart", out="bundle")
    assert outcome.code == 2
    assert "which would be lost" in outcome.err
    assert (case / "bundle" / "manifest.json").exists()


def test_two_runs_do_not_write_to_one_folder(tmp_path, enginesmith):
    bundle, target, flags = write_own_bundle(tmp_path)
    np.save(tmp_path / "x.npy", rows(ROWS))
    (flags / "slow").touch()
    arguments = ["run", bundle, "--data", tmp_path / "x.npy", "--out", tmp_path / "out", "--target", target]
    process = subprocess.Popen([sys.executable, "-m", "enginesmith", *map(str, arguments)])
    wait_for(tmp_path / "out" / "manifest.json")
    outcome = enginesmith(*arguments)
    process.kill()
    process.wait()
    assert outcome.code == 2
    assert "another process writes to" in outcome.err


MEMORY = """
import re, sys
import enginesmith
enginesmith.run(*sys.argv[1:4], batch=1024)
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


def peak_bytes(folder: Path, count: int) -> int:
    data = folder / f"{count}.npy"
    array = np.lib.format.open_memmap(data, mode="w+", dtype=np.float32, shape=(count, 4))
    array[:] = 0.5
    array.flush()
    command = [sys.executable, "-c", MEMORY, folder / "bundle", data, folder / f"out{count}"]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    data.unlink()
    return int(run.stdout.splitlines()[-1])


def test_memory_does_not_grow_with_the_data(case):
    """64 MB of inputs more, and 96 MB of outputs."""
    shutil.rmtree(case / "bundle")
    write_bundle(case / "bundle", described=signature(1, 256, 4096))
    small, large = peak_bytes(case, 100_000), peak_bytes(case, 4_100_000)
    assert large - small < 16 << 20, (small, large)


@pytest.mark.parametrize("data", ["x.npy", "x.jsonl", "give.py:give"])
def test_several_processes_give_the_same_bytes(run, case, data):
    with (case / "x.jsonl").open("w") as stream:
        stream.writelines(json.dumps({"x": row.tolist()}) + "\n" for row in rows(ROWS))
    (case / "give.py").write_text(
        f"import numpy as np\ndef give():\n  yield {{'x': np.load({str(case / 'x.npy')!r})}}\n"
    )
    assert run("--shard-rows", 20, out="whole", data=data).code == 0
    outcome = run("--shard-rows", 20, "--processes", 2, data=data)
    assert outcome.code == 0, outcome.err
    assert shards(case / "out") == shards(case / "whole")
    assert manifest(case / "out")["shards"] == manifest(case / "whole")["shards"]


def test_a_process_that_dies_loses_no_rows(tmp_path, enginesmith):
    bundle, target, flags = write_own_bundle(tmp_path)
    np.save(tmp_path / "x.npy", rows(ROWS))
    (flags / "die").touch()
    arguments = ["run", bundle, "--data", tmp_path / "x.npy", "--target", target, "--shard-rows", 20, "--processes", 2]
    outcome = enginesmith(*arguments, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert not (flags / "die").exists()
    assert "ended with exit code 9" in outcome.err
    assert "is run again" in outcome.err
    check(tmp_path / "out", rows(ROWS))


def test_a_shard_that_always_kills_its_process_ends_the_run(tmp_path, enginesmith):
    bundle, target, flags = write_own_bundle(tmp_path)
    np.save(tmp_path / "x.npy", rows(ROWS))
    (flags / "always").touch()
    arguments = ["run", bundle, "--data", tmp_path / "x.npy", "--target", target, "--processes", 2]
    outcome = enginesmith(*arguments, "--out", tmp_path / "out")
    assert outcome.code == 4
    assert "failed 3 times; the last: the engine on process" in outcome.err
    assert "ended with exit code 9" in outcome.err


def test_options_that_exclude_each_other(run):
    for arguments, message in {
        ("--gpus", "0,1", "--processes", "2"): "--gpus and --processes exclude each other",
        ("--gpus", "0,0"): "--gpus names no GPUs",
        ("--gpus", "a"): "--gpus 'a' cannot be read",
        ("--batch", "9"): "the engine takes no batch of 9",
        ("--only", "lefd"): "did you mean 'left'?",
        ("--keep", "left"): "'left' is an output and an array to keep",
    }.items():
        outcome = run(*arguments)
        assert outcome.code == 2, outcome.err
        assert message in outcome.err


def test_without_ray_a_message_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    outcome = run("--ray")
    assert outcome.code == 4
    assert "--ray needs Ray, which is not installed" in outcome.err
    assert "pip install 'enginesmith[ray]'" in outcome.err


def test_running_needs_no_torch(case):
    code = (
        "import sys, enginesmith\n"
        f"enginesmith.run({str(case / 'bundle')!r}, {str(case / 'x.npy')!r}, {str(case / 'out')!r})\n"
        "print(sorted({'torch', 'onnx', 'onnx_ir', 'click', 'pydantic', 'polygraphy', 'ray'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ)
    assert run.stdout.splitlines()[-1] == "[]"
