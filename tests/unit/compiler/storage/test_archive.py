"""Entries of one cache become those of another; an archive that is anything else changes nothing."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from enginesmith.compiler.storage.archive import export_entries, import_entries
from enginesmith.compiler.storage.cache import Cache
from enginesmith.compiler.storage.entries import scan
from enginesmith.errors import ArchiveError, OutputError

KEY = "a" * 64


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """A cache with an engine, a trial and a bundle."""
    folder = tmp_path / "engine"
    (folder / "weights").mkdir(parents=True)
    (folder / "model").write_text("text")
    (folder / "weights" / "w.bin").write_bytes(bytes(1000))
    cache = Cache(tmp_path / "cache")
    cache.put("engines", KEY, folder, what={"model": "net"}, notes={"machine": "a"})
    cache.put("bundles", KEY, folder)
    cache.write("trials", KEY, {"ratio": 2})
    return cache


@pytest.fixture
def other(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "other")


def edited(file: Path, change) -> Path:
    """A copy of an archive whose members are (name, content) pairs after `change`."""
    with tarfile.open(file) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar if m.isreg()]
    out = file.with_suffix(".edited")
    with tarfile.open(out, "w") as tar:
        for name, content in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out


def test_another_cache_serves_what_was_exported(cache, other, tmp_path):
    written = export_entries(cache, tmp_path / "a.tar")
    assert [(entry.kind, entry.key) for entry in written] == [("engines", KEY)]  # no numbers of this machine
    done = import_entries(other, tmp_path / "a.tar")
    assert ([entry.key for entry in done.added], done.known) == ([KEY], ())
    with other.reading("engines", KEY) as kept:
        assert (kept.content / "weights" / "w.bin").read_bytes() == bytes(1000)
        assert (kept.what, kept.notes) == ({"model": "net"}, {"machine": "a"})
    again = import_entries(other, tmp_path / "a.tar")
    assert (again.added, [entry.key for entry in again.known]) == ((), [KEY])
    assert os.listdir(other.root / "tmp") == []


def test_kinds_can_be_chosen(cache, other, tmp_path):
    export_entries(cache, tmp_path / "a.tar", ["trials", "bundles"])
    import_entries(other, tmp_path / "a.tar")
    assert sorted((entry.kind, entry.key) for entry in scan(other.root)) == [("bundles", KEY), ("trials", KEY)]
    assert other.read("trials", KEY) == {"ratio": 2}


def test_an_archive_tells_nobody_who_wrote_it(cache, tmp_path):
    export_entries(cache, tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert {(m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, "", "")}


def test_a_broken_entry_is_not_exported(cache, other, tmp_path):
    (cache.root / "engines" / KEY / "content" / "model").write_text("other")
    assert export_entries(cache, tmp_path / "a.tar") == []
    assert import_entries(other, tmp_path / "a.tar").added == ()


def test_a_broken_entry_gives_way_to_an_imported_one(cache, tmp_path):
    export_entries(cache, tmp_path / "a.tar")
    (cache.root / "engines" / KEY / "content" / "model").write_text("other")
    assert len(import_entries(cache, tmp_path / "a.tar").added) == 1
    with cache.reading("engines", KEY) as kept:
        assert (kept.content / "model").read_text() == "text"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: [(n, b"evil" if n.endswith("/model") else c) for n, c in m], "model changed"),
        (lambda m: [(n, c.replace(b'"net"', b'"ten"')) for n, c in m], "entry.json is damaged"),
        (lambda m: [item for item in m if not item[0].endswith("w.bin")], "weights/w.bin is missing"),
        (lambda m: [*m, (f"engines/{KEY}/content/more", b"")], "more was added"),
        (lambda m: [(n.replace("a" * 64, "b" * 64), c) for n, c in m], f"it was written as engines/{KEY}"),
        (lambda m: [item for item in m if item[0] != "index.json"], "its end is missing"),
        (lambda m: [item for item in m if item[0] == "index.json"], "other entries than it lists"),
    ],
)
def test_a_damaged_archive_changes_nothing(cache, other, tmp_path, change, message):
    export_entries(cache, tmp_path / "a.tar")
    with pytest.raises(ArchiveError, match=r"archive .* is damaged") as caught:
        import_entries(other, edited(tmp_path / "a.tar", change))
    assert message in str(caught.value.found)
    assert list(scan(other.root)) == []
    assert os.listdir(other.root / "tmp") == []


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/tmp/evil",
        f"engines/{KEY}/../../evil",
        f"engines/{KEY}/content/../../../../evil",
        f"engines/{KEY}/content//evil",
        f"engines/{KEY}/evil",
        f"engines/../{KEY}/content/evil",
        "engines/XYZ/content/evil",
        "builders/evil.timing",
        "evil",
    ],
)
def test_a_member_that_would_land_elsewhere_is_refused(cache, other, tmp_path, name):
    export_entries(cache, tmp_path / "a.tar")
    archive = edited(tmp_path / "a.tar", lambda m: [*m, (name, b"evil")])
    with pytest.raises(ArchiveError, match=r"holds a file named .*evil.*, which no entry of the cache has"):
        import_entries(other, archive)
    assert list(scan(other.root)) == []
    assert list(tmp_path.rglob("evil*")) == []
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(other, tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo(f"engines/{KEY}/content/model")
        link.type, link.linkname = kind, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ArchiveError, match="holds a link or a device named"):
        import_entries(other, tmp_path / "a.tar")


def test_a_folder_elsewhere_is_refused(other, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("elsewhere")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    with pytest.raises(ArchiveError, match="holds a folder named 'elsewhere'"):
        import_entries(other, tmp_path / "a.tar")


def test_an_archive_cut_short_and_one_that_is_none(cache, other, tmp_path):
    export_entries(cache, tmp_path / "a.tar")
    whole = (tmp_path / "a.tar").read_bytes()
    for length in (0, 100, 700, 2048, len(whole) // 2):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(ArchiveError, match=r"archive .*cut.tar' is damaged"):
            import_entries(other, tmp_path / "cut.tar")
    with pytest.raises(ArchiveError, match=r"archive .*absent' cannot be read"):
        import_entries(other, tmp_path / "absent")
    with pytest.raises(ArchiveError, match=r"archive .* cannot be read"):
        import_entries(other, tmp_path)


def test_more_than_the_cache_may_hold_is_refused(cache, other, tmp_path, monkeypatch):
    export_entries(cache, tmp_path / "a.tar")
    monkeypatch.setenv("ENGINESMITH_CACHE_GB", "1e-6")
    with pytest.raises(ArchiveError, match="holds more than the cache may") as caught:
        import_entries(other, tmp_path / "a.tar")
    assert caught.value.expected == "at most 1e-06 GB"


def test_where_nothing_can_be_written(cache, tmp_path):
    with pytest.raises(OutputError, match="is a folder"):
        export_entries(cache, tmp_path)
    with pytest.raises(OutputError, match="cannot be written"):
        export_entries(cache, tmp_path / "absent" / "a.tar")
    export_entries(cache, tmp_path / "a.tar")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cache .* cannot be written"):
        import_entries(Cache(tmp_path / "file"), tmp_path / "a.tar")
