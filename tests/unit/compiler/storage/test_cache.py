import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from enginesmith.compiler.storage.cache import Cache, code_digest, key
from enginesmith.compiler.storage.entries import ENTRY, scan
from enginesmith.compiler.storage.pruning import discard, prune, verify

READ_ONLY = """
import os, sys, tempfile
from pathlib import Path
from enginesmith.compiler.storage.cache import Cache
from enginesmith.compiler.storage.pruning import prune, verify
if os.geteuid() == 0:  # nothing keeps root from writing
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
cache = Cache(Path(sys.argv[1]))
with cache.making("engines", "cc", wait_s=5) as waited:
    assert not waited
    cache.put("engines", "cc", cache.root / "engines" / "aa")
cache.write("trials", "dd", {})
with cache.reading("engines", "aa") as kept:
    print((kept.content / "file").read_text(), cache.read("trials", "bb"), cache.read("trials", "dd"))
print(verify(cache.root).broken, len(prune(cache.root, 0).in_use))
print(cache.folder("builders").is_relative_to(cache.root))
"""


def entry(tmp_path, text: str):
    folder = tmp_path / text
    folder.mkdir()
    (folder / "file").write_text(text)
    return folder


def text_of(cache: Cache, name: str) -> str | None:
    with cache.reading("engines", name) as kept:
        return None if kept is None else (kept.content / "file").read_text()


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def test_what_was_put_comes_back_with_its_notes(cache, tmp_path):
    cache.put("engines", "aa", entry(tmp_path, "text"), what={"model": "net"}, notes={"a": "1"})
    with cache.reading("engines", "aa") as kept:
        assert (kept.content / "file").read_text() == "text"
        assert (kept.what, kept.notes) == ({"model": "net"}, {"a": "1"})
    assert os.listdir(cache.root / "tmp") == []


def test_unknown_key(cache):
    assert text_of(cache, "aa") is None


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda content: (content / "file").write_text("other"), "file changed"),
        (lambda content: (content / "file").unlink(), "file is missing"),
        (lambda content: (content / "more").write_text(""), "more was added"),
        (lambda content: (content.parent / ENTRY).unlink(), "entry.json is missing or damaged"),
        (lambda content: (content.parent / ENTRY).write_text("{}"), "entry.json is damaged"),
        (lambda content: _edit(content.parent / ENTRY, "text", "next"), "entry.json is damaged"),
    ],
)
def test_damaged_entries_are_found_and_not_served(cache, tmp_path, damage, problem):
    cache.put("engines", "aa", entry(tmp_path, "text"), what={"model": "text"})
    content = cache.root / "engines" / "aa" / "content"
    damage(content)
    found = verify(cache.root, remove=False)
    assert [(e.kind, e.key, e.problem) for e in found.broken] == [("engines", "aa", problem)]
    assert not found.removed
    assert text_of(cache, "aa") is None
    assert verify(cache.root).removed <= {("engines", "aa")}
    assert not content.exists()
    cache.put("engines", "aa", entry(tmp_path, "again"))
    assert text_of(cache, "aa") == "again"


def _edit(file, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new))


def test_an_entry_that_was_moved_to_another_key_is_not_served(cache, tmp_path):
    cache.put("engines", "aa", entry(tmp_path, "text"))
    (cache.root / "engines" / "aa").rename(cache.root / "engines" / "bb")
    assert text_of(cache, "bb") is None


def test_a_whole_cache_verifies(cache, tmp_path):
    cache.put("engines", "aa", entry(tmp_path, "text"))
    cache.write("trials", "bb", {"a": 1})
    found = verify(cache.root)
    assert (found.entries, found.broken) == (2, ())


def test_a_new_entry_takes_the_place_of_the_old_one_unless_that_is_being_read(cache, tmp_path):
    cache.put("engines", "aa", entry(tmp_path, "one"))
    cache.put("engines", "aa", entry(tmp_path, "two"))
    assert text_of(cache, "aa") == "two"
    with cache.reading("engines", "aa") as kept:
        cache.put("engines", "aa", entry(tmp_path, "three"))
        assert (kept.content / "file").read_text() == "two"
    assert os.listdir(cache.root / "tmp") == []


def test_values(cache):
    assert cache.read("trials", "aa") is None
    cache.write("trials", "aa", {"ratio": 1.25, "names": ["a"], "of": {10: 1, 9: 2}})
    assert cache.read("trials", "aa") == {"ratio": 1.25, "names": ["a"], "of": {"10": 1, "9": 2}}
    cache.write("trials", "aa", {"ratio": 2})
    assert cache.read("trials", "aa") == {"ratio": 2}
    file = cache.root / "trials" / "aa.json"
    file.write_text(file.read_text().replace('"ratio": 2', '"ratio": 3'))
    assert cache.read("trials", "aa") is None
    assert not file.exists()


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path):
    (tmp_path / "cache").write_text("a file")
    cache = Cache(tmp_path / "cache")
    cache.put("engines", "aa", entry(tmp_path, "text"))
    cache.write("trials", "aa", {})
    assert text_of(cache, "aa") is None
    assert cache.read("trials", "aa") is None
    with cache.making("engines", "aa", wait_s=0) as waited:
        assert not waited
    assert cache.folder("builders").is_dir()


def test_a_cache_that_may_only_be_read_serves(tmp_path):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is for its user alone
        cache = Cache(Path(folder) / "cache")
        cache.put("engines", "aa", entry(tmp_path, "text"))
        cache.write("trials", "bb", {"a": 1})
        Path(folder).chmod(0o755)
        for path in [cache.root, *cache.root.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        run = subprocess.run(
            [sys.executable, "-c", READ_ONLY, str(cache.root)], capture_output=True, text=True, check=False
        )
        for path in [cache.root, *cache.root.rglob("*")]:
            path.chmod(0o755)
    assert run.stdout.splitlines() == ["text {'a': 1} None", "() 2", "False"], run.stderr


def test_entries_unused_for_longest_go_first(cache, tmp_path, monkeypatch):
    cache.put("engines", "aa", entry(tmp_path, "old"))
    cache.put("engines", "bb", entry(tmp_path, "new"))
    size = {found.key: found.size_bytes for found in scan(cache.root)}
    os.utime(cache.root / "engines" / "bb" / ENTRY, (1, 1))
    assert text_of(cache, "aa") == "old"  # a use
    monkeypatch.setenv("ENGINESMITH_CACHE_GB", str((size["aa"] + size["bb"] + 20) / 1e9))
    cache.put("engines", "cc", entry(tmp_path, "abc"))
    assert {found.key for found in scan(cache.root)} == {"aa", "cc"}


def test_prune_by_age_and_kind(cache, tmp_path):
    for name in ("aa", "bb"):
        cache.put("engines", name, entry(tmp_path, name))
        cache.write("trials", name, {})
    (cache.folder("builders") / "gpu.timing").write_text("tactics")
    week = time.time() - 7 * 86400
    for path in ("engines/aa/entry.json", "trials/aa.json", "builders/gpu.timing"):
        os.utime(cache.root / path, (week, week))
    found = prune(cache.root, float("inf"), older_than_s=86400, kinds=["engines", "builders"])
    assert {(e.kind, e.key) for e in found.removed} == {("engines", "aa"), ("builders", "gpu.timing")}
    assert {(e.kind, e.key) for e in scan(cache.root)} == {("engines", "bb"), ("trials", "aa"), ("trials", "bb")}
    assert found.left_bytes == sum(e.size_bytes for e in scan(cache.root, ["engines"]))
    prune(cache.root, 0)
    assert list(scan(cache.root)) == []


def test_sizes_are_known_without_looking_at_the_files(cache, tmp_path):
    cache.put("engines", "aa", entry(tmp_path, "0123456789"))
    found = next(scan(cache.root))
    (cache.root / "engines" / "aa" / "content" / "file").unlink()
    assert next(scan(cache.root)).size_bytes == found.size_bytes
    assert found.size_bytes == 10 + (cache.root / "engines" / "aa" / ENTRY).stat().st_size
    (cache.root / "trials").mkdir()
    (cache.root / "trials" / "bb.json").write_bytes(b"\xff" * 7)
    assert [e.size_bytes for e in scan(cache.root, ["trials"], brief=True)] == [7]


def test_what_is_being_read_is_not_removed(cache, tmp_path):
    cache.put("engines", "aa", entry(tmp_path, "text"))
    with cache.reading("engines", "aa") as kept:
        found = prune(cache.root, 0)
        assert ([e.key for e in found.in_use], found.removed) == (["aa"], ())
        assert (kept.content / "file").read_text() == "text"
    assert [e.key for e in prune(cache.root, 0).removed] == ["aa"]


def test_without_locks_what_was_used_lately_is_not_removed(cache, tmp_path, monkeypatch):
    cache.put("engines", "aa", entry(tmp_path, "text"))
    monkeypatch.setattr("enginesmith.compiler.storage.locks.fcntl", None)
    (listed,) = scan(cache.root)
    assert not discard(cache.root, listed)
    assert text_of(cache, "aa") == "text"
    os.utime(cache.root / "engines" / "aa" / ENTRY, (1, 1))
    (listed,) = scan(cache.root)
    assert discard(cache.root, listed)


def test_entries_of_another_layout_give_way(cache, tmp_path):
    old = cache.root / "engines" / "aa"
    old.mkdir(parents=True)
    (old / "hashes.json").write_text("{}")
    assert text_of(cache, "aa") is None
    cache.put("engines", "aa", entry(tmp_path, "text"))
    assert text_of(cache, "aa") == "text"


def test_environment_places_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ENGINESMITH_CACHE", raising=False)
    assert Cache().root == tmp_path / "enginesmith"
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "own"))
    assert Cache().root == tmp_path / "own"


def test_keys_ignore_order_and_follow_content():
    assert key({"a": 1, "b": 2}) == key({"b": 2, "a": 1})
    assert key({"a": 1}) != key({"a": 2})
    assert len(code_digest()) == 64


def test_an_entry_says_what_it_is(cache, tmp_path):
    cache.put(
        "engines", "aa", entry(tmp_path, "text"), what={"model": "net.py:net", "target": "t", "precision": "fp32"}
    )
    (found,) = scan(cache.root)
    told = found.to_json()
    assert json.loads(json.dumps(told)) == told
    assert told["what"] == {"model": "net.py:net", "target": "t", "precision": "fp32"}
    assert (told["kind"], told["key"], told["problem"]) == ("engines", "aa", "")
