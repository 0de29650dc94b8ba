"""Several processes at one cache: real ones, some of which are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from enginesmith.compiler.storage.cache import Cache
from enginesmith.compiler.storage.entries import scan
from enginesmith.compiler.storage.pruning import prune, sweep, verify

HEAD = """
import sys, time
from pathlib import Path
from enginesmith.compiler.storage.cache import Cache
from enginesmith.compiler.storage.pruning import prune
cache, work = Cache(Path(sys.argv[1])), Path(sys.argv[2])
def folder(text, files=3):
    made = work / text
    made.mkdir(exist_ok=True)
    for number in range(files):
        (made / str(number)).write_text(text * 1000)
    return made
"""


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def start(cache: Cache, tmp_path: Path):
    """Starts a process with this code, and ends it with the test."""
    running: list[subprocess.Popen[str]] = []

    def run(code: str) -> subprocess.Popen[str]:
        work = tmp_path / f"work{len(running)}"
        work.mkdir()
        command = [sys.executable, "-c", HEAD + textwrap.dedent(code), str(cache.root), str(work)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_processes_put_read_and_prune_at_once(start, cache):
    code = """
        seen = 0
        for turn in range(40):
            name = f"a{turn % 4}"
            cache.put("engines", name, folder(name))
            cache.write("trials", name, {"turn": turn})
            with cache.reading("engines", name) as kept:
                if kept is not None:
                    time.sleep(0.002)
                    texts = {(kept.content / str(n)).read_text() for n in range(3)}
                    assert texts == {name * 1000}, texts
                    seen += 1
            value = cache.read("trials", name)
            assert value is None or set(value) == {"turn"}, value
            if turn % 5 == 0:
                prune(cache.root, 7000)
        print("seen", seen > 0)
    """
    processes = [start(code) for _ in range(3)]
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == ["seen True"] * 3
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert verify(cache.root).broken == ()
    prune(cache.root, 0)
    assert [path for path in cache.root.rglob("*") if path.is_file()] == []


def test_one_makes_and_the_other_waits_for_it(start, cache):
    code = """
        told = []
        print("begins", flush=True)
        with cache.making("engines", "aa", wait_s=60, waiting=told.append) as waited:
            with cache.reading("engines", "aa") as kept:
                there = kept is not None
            if not there:
                print("makes", flush=True)
                sys.stdin.readline()
                cache.put("engines", "aa", folder("text"))
        print(waited, there, *told, flush=True)
    """
    first = start(code)
    assert [said(first), said(first)] == ["begins", "makes"]
    second = start(code)
    assert said(second) == "begins"
    with pytest.raises(subprocess.TimeoutExpired, match="timed out"):
        second.wait(0.3)
    tell(first)
    assert said(first) == "False False"
    assert said(second).startswith(f"True True process {first.pid} on ")
    assert os.listdir(cache.root / "locks") == []


def test_a_wait_ends_after_its_time(start, cache):
    holder = start("""
        with cache.making("engines", "aa", wait_s=0):
            print("holds", flush=True)
            sys.stdin.readline()
    """)
    assert said(holder) == "holds"
    told: list[str] = []
    with cache.making("engines", "aa", wait_s=0.3, waiting=told.append) as waited:
        assert waited
    assert told[0].startswith(f"process {holder.pid} on ")
    with cache.making("engines", "bb", wait_s=0) as waited:
        assert not waited


def test_a_killed_maker_leaves_no_lock(start, cache):
    holder = start("""
        with cache.making("engines", "aa", wait_s=0):
            print("holds", flush=True)
            sys.stdin.readline()
    """)
    assert said(holder) == "holds"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    told: list[str] = []
    with cache.making("engines", "aa", wait_s=0, waiting=told.append) as waited:
        assert (waited, told) == (False, [])


def test_a_process_killed_while_it_writes_leaves_no_half_entry(start, cache):
    writer = start("""
        import shutil
        copy = shutil.copytree
        def half(source, target):
            copy(source, target)
            print("writes", flush=True)
            sys.stdin.readline()
        shutil.copytree = half
        cache.put("engines", "aa", folder("text"))
    """)
    assert said(writer) == "writes"
    assert list((cache.root / "tmp").glob("*/entry/content/*"))
    sweep(cache.root)
    assert list((cache.root / "tmp").glob("*/entry/content/*")), "a living process's files were removed"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    with cache.reading("engines", "aa") as kept:
        assert kept is None
    assert list(scan(cache.root)) == []
    sweep(cache.root)
    assert os.listdir(cache.root / "tmp") == []


def test_a_process_killed_while_it_removes_leaves_nothing(start, cache, tmp_path):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "file").write_text("text")
    cache.put("engines", "aa", tmp_path / "engine")
    remover = start("""
        import shutil
        from enginesmith.compiler.storage import pruning
        def stuck(path, **_):
            print("removes", flush=True)
            sys.stdin.readline()
        shutil.rmtree = stuck
        prune(cache.root, 0)
    """)
    assert said(remover) == "removes"
    remover.send_signal(signal.SIGKILL)
    remover.wait()
    with cache.reading("engines", "aa") as kept:
        assert kept is None
    assert os.listdir(cache.root / "engines") == []
    sweep(cache.root)
    assert os.listdir(cache.root / "tmp") == []


def test_what_another_process_reads_is_not_pruned(start, cache, tmp_path):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "file").write_text("text")
    cache.put("engines", "aa", tmp_path / "engine")
    reader = start("""
        with cache.reading("engines", "aa") as kept:
            print("reads", flush=True)
            sys.stdin.readline()
            print((kept.content / "file").read_text(), flush=True)
    """)
    assert said(reader) == "reads"
    found = prune(cache.root, 0)
    assert ([entry.key for entry in found.in_use], found.removed) == (["aa"], ())
    tell(reader)
    assert said(reader) == "text"
    reader.wait()
    assert [entry.key for entry in prune(cache.root, 0).removed] == ["aa"]


def test_files_that_killed_builders_left_are_removed_when_they_are_old(cache):
    builders = cache.folder("builders")
    (builders / "onnxruntime-x1").mkdir()
    (builders / "inductor-x2").mkdir()
    (builders / "gpu.timing.4711").write_text("half")
    (builders / "gpu.timing").write_text("whole")
    for name in ("onnxruntime-x1", "gpu.timing.4711", "gpu.timing"):
        os.utime(builders / name, (1, 1))
    sweep(cache.root)
    assert sorted(os.listdir(builders)) == ["gpu.timing", "inductor-x2"]
