"""A finished bundle that is added to."""

from __future__ import annotations

import json
import runpy
import threading
from pathlib import Path

import pytest

from enginesmith.compiler.bundle import amending
from enginesmith.compiler.engine import read_manifest
from enginesmith.compiler.storage.files import hashes
from enginesmith.errors import UsageError

example = runpy.run_path(str(Path(__file__).with_name("manifest_example.py")))["example"]
service = runpy.run_path(str(Path(__file__).parent / "report" / "searches_example.py"))["service"]


@pytest.fixture
def bundle(tmp_path):
    found = tmp_path / "net"
    found.mkdir()
    (found / "report.html").write_text("old")
    (found / "recipe.yaml").write_text("model: net.onnx")
    (found / "manifest.json").write_text(json.dumps({**example(), "files": hashes(found)}))
    return found


def test_what_is_added_stands_in_manifest_and_report_and_hashes_hold(bundle):
    with amending(bundle) as manifest:
        manifest["services"] = [service()]
    written = read_manifest(bundle)
    assert written["services"][0]["overhead_ms"] == 0.651
    assert "Served to one client" in (bundle / "report.html").read_text()
    found = hashes(bundle)
    del found["manifest.json"]
    assert found == written["files"]


def test_an_error_changes_nothing_and_leaves_nothing(bundle):
    before = hashes(bundle)
    with pytest.raises(TypeError, match="not iterable"), amending(bundle) as manifest:
        manifest["engines"] = None  # what no report can be made of
    assert hashes(bundle) == before


def test_those_who_add_at_once_wait_for_each_other(bundle):
    def add() -> None:
        with amending(bundle) as manifest:
            manifest["services"] = [*manifest.get("services", ()), service()]

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_manifest(bundle)["services"]) == 4


def test_a_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(UsageError, match="is not a bundle"), amending(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
