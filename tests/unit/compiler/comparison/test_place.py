"""Spellings of an engine."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from enginesmith.compiler.comparison.place import find
from enginesmith.compiler.engine import load
from enginesmith.compiler.validation.metrics import TOLERANCES
from enginesmith.errors import EngineError, EngineMismatchError, UnknownNameError, UsageError

small = runpy.run_path(str(Path(__file__).parents[3] / "small_bundles.py"))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    engines = {"plain": "", "scaled": "scaled"}
    return Path(small["write_bundle"](tmp_path / "net", engines, times_ms={"plain": 2.0, "scaled": 1.0}))


def test_a_bundle_is_its_best_engine(bundle: Path) -> None:
    place = find(bundle)
    assert place.info.name == load(bundle).name == "scaled"
    assert str(place) == f"{bundle}#scaled"
    assert place.reference() is not None


def test_an_engine_of_a_bundle_is_named_behind_a_hash_or_by_its_folder(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find(f"{bundle}#plain").info.name == "plain"
    assert str(find(bundle / "engines" / "plain")) == f"{bundle}#plain"
    monkeypatch.chdir(bundle.parent)
    assert str(find("net/engines/plain")) == "net#plain"
    monkeypatch.chdir(bundle / "engines" / "plain")
    assert find(".").bundle is not None


def test_a_folder_that_stands_alone_has_no_record(tmp_path: Path) -> None:
    place = find(small["write_engine"](tmp_path / "engines" / "plain"))
    assert (place.bundle, place.record, place.reference()) == (None, None, None)
    assert place.tolerance == TOLERANCES["fp32"]
    assert str(place) == str(tmp_path / "engines" / "plain")


def test_a_pruned_engine_has_the_bounds_of_8_bits(tmp_path: Path) -> None:
    assert find(small["write_engine"](tmp_path / "plain-pruned")).tolerance == TOLERANCES["int8"]


@pytest.mark.parametrize(("made", "found"), [("", "no such folder"), ("file", "a file"), ("folder/", "another folder")])
def test_something_else_is_refused(tmp_path: Path, made: str, found: str) -> None:
    path = tmp_path / "thing"
    if made == "file":
        path.write_text("")
    elif made:
        path.mkdir()
    with pytest.raises(UsageError, match=rf"'.*thing' is neither a bundle nor an engine(?s:.)*found: {found}"):
        find(path)


def test_an_engine_that_the_bundle_lacks_gets_a_suggestion(bundle: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown engine 'plane'(?s:.)*did you mean 'plain'"):
        find(f"{bundle}#plane")


def test_an_engine_that_changed_is_refused(bundle: Path) -> None:
    (bundle / "engines" / "plain" / "model.onnx").write_text("changed")
    with pytest.raises(EngineMismatchError, match="changed after it was written"):
        find(f"{bundle}#plain")


def test_an_engine_of_another_version_is_refused(tmp_path: Path) -> None:
    engine = small["write_engine"](tmp_path / "plain")
    (engine / "engine.json").write_text("{}")
    with pytest.raises(EngineMismatchError, match=r"engine.json' cannot be read by this version of enginesmith"):
        find(engine)


def test_an_engine_for_another_machine_is_refused(tmp_path: Path) -> None:
    engine = small["write_engine"](tmp_path / "plain")
    info = json.loads((engine / "engine.json").read_text())
    (engine / "engine.json").write_text(json.dumps({**info, "requires": {"machine": "sparc"}}))
    with pytest.raises(EngineMismatchError, match="engine plain was built for another machine"):
        find(engine)


def test_a_bundle_without_a_valid_engine_says_why(bundle: Path) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    for engine in manifest["engines"]:
        engine["validation"]["passed"] = False
    path.write_text(json.dumps(manifest))
    with pytest.raises(EngineError, match="plain: failed validation; name it to load it all the same"):
        find(bundle)
