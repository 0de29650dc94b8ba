import os
import resource
import subprocess
import sys
import textwrap

import pytest

from enginesmith.compiler.storage.files import appearing_folder, hashes, size_bytes, storage_errors
from enginesmith.errors import OutputError, StorageError


def test_folder_appears_only_when_the_block_ends_well(tmp_path):
    with appearing_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("new")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_an_error_leaves_the_older_folder(tmp_path):
    with appearing_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("old")
    with pytest.raises(ZeroDivisionError, match="division"), appearing_folder(tmp_path / "out") as folder:
        (folder / str(1 / 0)).write_text("new")
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_an_older_folder_is_replaced(tmp_path):
    for text in ("old", "new"):
        with appearing_folder(tmp_path / "out") as folder:
            (folder / text).write_text(text)
    assert os.listdir(tmp_path / "out") == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    code = f"""
        import os, signal
        from pathlib import Path
        from enginesmith.compiler.storage.files import appearing_folder
        with appearing_folder(Path({str(tmp_path / "out")!r})) as folder:
            (folder / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert len(os.listdir(tmp_path)) == 1
    assert not (tmp_path / "out").exists()
    with appearing_folder(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == ["out"]


def test_full_disk(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StorageError, match="no space left while writing"), appearing_folder(tmp_path / "out") as f:
            (f / "file").write_bytes(bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_output_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"output .* cannot be written"), appearing_folder(tmp_path / "file" / "out"):
        pass


def test_refused_write_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"), storage_errors(tmp_path):
        raise PermissionError(13, "Permission denied", str(tmp_path / "file"))


def test_refused_reading_elsewhere_is_not_blamed_on_the_output(tmp_path):
    with pytest.raises(PermissionError, match="elsewhere"), storage_errors(tmp_path / "out"):
        raise PermissionError(13, "Permission denied", "/elsewhere")


def test_output_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match=r"output .* is a file"), appearing_folder(tmp_path / "out"):
        pass


def test_hashes_and_sizes_cover_all_files(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("text")
    assert hashes(tmp_path) == {"a/b/file": "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"}
    assert size_bytes(tmp_path) == 4
