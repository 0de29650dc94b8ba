"""`enginesmith cache`: what its commands do, say and end with."""

from __future__ import annotations

import json
import os
import sys

import pytest

from enginesmith.cli import main
from enginesmith.compiler.console.cache import parse_age
from enginesmith.compiler.storage.cache import Cache
from enginesmith.compiler.storage.entries import scan
from enginesmith.errors import RecipeError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "model").write_bytes(bytes(200_000))
    cache = Cache()
    what = {"model": "net.py:net", "target": "onnxruntime-cpu", "precision": "fp32"}
    cache.put("engines", "a" * 64, tmp_path / "engine", what=what)
    cache.put("engines", "b" * 64, tmp_path / "engine", what=what)
    cache.write("trials", "c" * 64, {"ratio": 2})
    os.utime(cache.root / "engines" / ("a" * 64) / "entry.json", (1, 1))
    return cache


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["enginesmith", "cache", *map(str, arguments)])
        with pytest.raises(SystemExit, match=r"^\d+$") as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


def test_list_tells_what_each_entry_is(cache, command):
    code, out, _ = command("list")
    assert code == 0
    assert "net.py:net, onnxruntime-cpu, fp32" in out
    assert "aaaaaaaaaaaa" in out
    assert f"3 entries, 0.000401 of 20 GB in {cache.root}" in out
    code, out, _ = command("list", "--json", "--kind", "engines")
    told = json.loads(out)
    assert told["size_bytes"] == sum(entry["size_bytes"] for entry in told["entries"]) > 400_000
    assert [entry["key"][0] for entry in told["entries"]] == ["b", "a"]  # the last one used first
    assert told["room_bytes"] == 20e9


def test_an_empty_cache(tmp_path, monkeypatch, command):
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "none"))
    assert command("list") == (0, f"0 entries, 0 of 20 GB in {tmp_path / 'none'}\n", "")
    assert command("verify") == (0, "0 entries, 0 broken\n", "")
    assert command("prune") == (0, "0 entries, 0.000 MB, were removed; 0.000 MB are left\n", "")


def test_prune_by_size_age_and_all(cache, command):
    assert json.loads(command("prune", "--json")[1])["removed"] == []
    code, out, _ = command("prune", "--older-than", "30d", "--json")
    assert (code, [entry["key"][0] for entry in json.loads(out)["removed"]]) == (0, ["a"])
    code, out, _ = command("prune", "--max-size", "0.0001", "--kind", "engines")
    assert (code, out) == (0, "1 entries, 0.2 MB, were removed; 0.000 MB are left\n")
    assert [entry.kind for entry in scan(cache.root)] == ["trials"]
    assert command("prune", "--all")[1].startswith("1 entries")
    assert list(scan(cache.root)) == []


def test_prune_says_what_is_in_use(cache, command):
    with cache.reading("engines", "b" * 64):
        out = command("prune", "--all")[1]
    assert out.startswith("2 entries, 0.2 MB, were removed, 1 that are in use or cannot be removed stay; 0.2 MB")


def test_verify_ends_with_1_where_an_entry_is_broken(cache, command):
    assert command("verify") == (0, "3 entries, 0 broken\n", "")
    (cache.root / "engines" / ("a" * 64) / "content" / "model").write_bytes(b"")
    code, out, _ = command("verify", "--keep")
    assert (code, "model changed; still there" in out) == (1, True)
    code, out, _ = command("verify", "--json")
    assert code == 1
    assert [(e["problem"], e["removed"]) for e in json.loads(out)["broken"]] == [("model changed", True)]
    assert command("verify")[0] == 0


def test_export_and_import(cache, command, tmp_path, monkeypatch):
    code, out, _ = command("export", tmp_path / "engines.tar")
    assert (code, out.startswith("2 entries, 0.4 MB, are in ")) == (0, True)
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "other"))
    assert command("import", tmp_path / "engines.tar") == (0, "2 entries were added, 0 were there\n", "")
    code, out, _ = command("import", tmp_path / "engines.tar", "--json")
    assert [len(json.loads(out)[name]) for name in ("added", "known")] == [0, 2]
    assert command("import", tmp_path / "absent")[0] == 2


def test_wrong_requests(cache, command):
    code, _, err = command("prune", "--all", "--max-size", "1")
    assert (code, "--all leaves nothing for --max-size and --older-than" in err) == (2, True)
    code, out, _ = command("prune", "--older-than", "soon", "--json")
    assert (code, json.loads(out)["error"]["type"]) == (2, "RecipeError")
    code, _, err = command("lst")
    assert (code, "did you mean 'list'?" in err) == (2, True)
    code, _, err = command("list", "--kind", "x")
    assert (code, "is not one of" in err) == (2, True)
    assert len(list(scan(cache.root))) == 3


def test_ages():
    assert [parse_age(text) for text in ("90m", "1.5h", "30d", "2W")] == [5400, 5400, 30 * 86400, 14 * 86400]
    for text in ("30", "d", "-1d", "1y", ""):
        with pytest.raises(RecipeError, match=r"--older-than .* is no age"):
            parse_age(text)
