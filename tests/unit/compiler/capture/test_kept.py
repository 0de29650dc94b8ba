"""Exports that are kept: taken where nothing changed and they still reproduce the model, and else made anew."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from enginesmith.compiler.capture import Captured, capture
from enginesmith.compiler.capture.exporters import EXPORTERS
from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.compiler.storage.cache import Cache
from enginesmith.compiler.storage.entries import scan

pytestmark = pytest.mark.filterwarnings("ignore")


class Scaled(torch.nn.Module):
    """What it multiplies by is no weight, and its text does not show it."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.by = by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.by


class Case:
    """Captures in a folder of its own each time, with one cache."""

    def __init__(self, folder: Path) -> None:
        self.cache = Cache(folder / "cache")
        self.folder = folder
        self.log: list[str] = []

    def __call__(self, module: torch.nn.Module, dynamic: str = "x:0=1..4..8", **options: Any) -> Captured:
        model = load_model(module, inputs=parse_inputs(["x:1x3"], [dynamic]))
        directory = self.folder / str(len(list(self.folder.iterdir())))
        directory.mkdir()
        self.log.clear()
        given = {"exporter": "torchscript", "opset_range": (9, 17), "samples": None, "seed": 0, **options}
        return capture(model, directory=directory, log=self.log.append, cache=self.cache, **given)

    @property
    def taken(self) -> bool:
        return "capture: the export was taken from the cache" in self.log


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def scaled(by: float = 1.0, seed: int = 0) -> Scaled:
    torch.manual_seed(seed)
    return Scaled(by)


def refuse(*_: object) -> None:
    raise AssertionError("exported again")


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_model_is_exported_once(case: Case, exporter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"exporter": exporter, "opset_range": (9, 20)}
    first = case(scaled(), **options)
    assert not case.taken
    monkeypatch.setitem(EXPORTERS, exporter, refuse)  # type: ignore[index]
    second = case(scaled(), **options)
    assert case.taken
    assert first.graph is not None
    assert second.graph is not None
    assert second.graph.fingerprint() == first.graph.fingerprint()
    assert second.path is not None
    assert second.path != first.path
    assert second.record["checks"] == first.record["checks"]


def test_other_weights_ranges_and_opsets_are_exported_anew(case: Case) -> None:
    case(scaled())
    for module, options in ((scaled(seed=1), {}), (scaled(), {"dynamic": "x:0=1..4..9"}), (scaled(), {"opset": 16})):
        assert case(module, **options).graph is not None
        assert not case.taken
    assert len(list(scan(case.cache.root, ["captures"]))) == 4


def test_an_export_that_no_longer_gives_what_the_model_gives_is_replaced(case: Case) -> None:
    case(scaled())
    changed = case(scaled(by=2.0))
    assert not case.taken
    assert any("of no use any more: the graph differs from the reference" in line for line in case.log)
    assert changed.graph is not None
    assert all(check["relative_l2"] < 1e-6 for check in changed.record["checks"])
    case(scaled(by=2.0))
    assert case.taken


def test_code_that_the_model_calls_counts(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "helper_of_the_model.py"
    file.write_text("slope = 0.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, file.stem, importlib.import_module(file.stem))
    case(scaled())
    case(scaled())
    assert case.taken
    file.write_text("slope = 0.25\n")
    case(scaled())
    assert not case.taken


def test_a_module_whose_file_is_gone_is_no_reason_to_fail(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "removed_helper_of_the_model.py"
    file.write_text("slope = 0.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, file.stem, importlib.import_module(file.stem))
    file.unlink()
    assert case(scaled()).graph is not None
    case(scaled())
    assert case.taken


def test_an_export_that_would_fill_the_cache_is_not_kept(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINESMITH_CACHE_GB", "1e-6")
    case(scaled())
    assert list(scan(case.cache.root, ["captures"])) == []
