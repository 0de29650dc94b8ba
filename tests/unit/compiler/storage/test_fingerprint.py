"""Which modules of the user a bundle in the cache depends on."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from enginesmith.compiler.storage.fingerprint import local_modules, still_hold


def _imported(monkeypatch: pytest.MonkeyPatch, name: str, file: str) -> None:
    module = types.ModuleType(name)
    module.__file__ = file
    monkeypatch.setitem(sys.modules, name, module)


def test_a_module_of_the_user_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "layers.py"
    file.write_text("WIDTH = 8\n")
    known = set(sys.modules)
    _imported(monkeypatch, "layers", str(file))
    found = local_modules(known)
    assert list(found) == [str(file)]
    assert still_hold(found)
    file.write_text("WIDTH = 16\n")
    assert not still_hold(found)
    file.unlink()
    assert not still_hold(found)


def test_a_module_without_a_real_file_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    known = set(sys.modules)
    _imported(monkeypatch, "made_up_ops", "_ops.py")  # as torch.ops does
    assert local_modules(known) == {}


def test_installed_modules_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    known = set(sys.modules)
    _imported(monkeypatch, "another_name_of_numpy", str(sys.modules["numpy"].__file__))
    assert local_modules(known) == {}
