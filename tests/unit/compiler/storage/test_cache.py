from enginesmith.compiler.storage.cache import Cache, code_digest, key


def entry(tmp_path, text: str):
    folder = tmp_path / text
    folder.mkdir()
    (folder / "file").write_text(text)
    return folder


def test_what_was_put_comes_back_with_its_notes(tmp_path):
    cache = Cache(tmp_path / "cache")
    cache.put("engines", "aa", entry(tmp_path, "text"), notes={"a": "1"})
    kept = cache.get("engines", "aa")
    assert kept is not None
    assert (kept / "file").read_text() == "text"
    assert cache.notes("engines", "aa") == {"a": "1"}


def test_unknown_key(tmp_path):
    assert Cache(tmp_path / "cache").get("engines", "aa") is None


def test_changed_content_is_not_served(tmp_path):
    cache = Cache(tmp_path / "cache")
    cache.put("engines", "aa", entry(tmp_path, "text"))
    (tmp_path / "cache" / "engines" / "aa" / "content" / "file").write_text("other")
    assert cache.get("engines", "aa") is None
    assert not (tmp_path / "cache" / "engines" / "aa").exists()


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path):
    (tmp_path / "cache").write_text("a file")
    cache = Cache(tmp_path / "cache")
    cache.put("engines", "aa", entry(tmp_path, "text"))
    assert cache.get("engines", "aa") is None
    assert cache.folder("builders").is_dir()


def test_entries_unused_for_longest_go_first(tmp_path, monkeypatch):
    import os

    cache = Cache(tmp_path / "cache")
    cache.put("engines", "aa", entry(tmp_path, "old"))
    os.utime(tmp_path / "cache" / "engines" / "aa", (1, 1))
    monkeypatch.setenv("ENGINESMITH_CACHE_GB", "1e-7")  # 100 bytes: one entry
    cache.put("engines", "bb", entry(tmp_path, "new"))
    assert cache.get("engines", "aa") is None
    assert cache.get("engines", "bb") is not None


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
