from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from enginesmith.compiler.engine import load
from enginesmith.compiler.generation.speculative import Speculation
from enginesmith.errors import EngineMismatchError, RecipeError, UnknownNameError
from enginesmith.serving.counted import COUNTERS, Counted
from enginesmith.serving.repository import export
from enginesmith.serving.settings import Serving

small = runpy.run_path(str(Path(__file__).parents[2] / "small_decoder.py"))


@pytest.fixture
def bundles(tmp_path):
    return small["write_bundle"](tmp_path / "checking", drafted=3), small["write_bundle"](tmp_path / "plain")


def test_the_draft_is_a_bundle_beside_the_engine(bundles, tmp_path):
    checking, plain = bundles
    export(checking, tmp_path / "models", Serving(draft=str(plain)))
    version = tmp_path / "models" / "checking" / "1"
    wanted = json.loads((version / "serve.json").read_text())
    assert wanted["draft"] == {"bundle": "draft", "engine": "decoder", "gpu_option": None}
    with load(version / "bundle") as engine, load(version / "draft", wanted["draft"]["engine"]) as draft:
        counts = Speculation()
        assert engine.generate([[3, 1, 4]], 6, draft=draft, speculation=counts) == [small["greedy"]([3, 1, 4], 6)]
        assert counts.accepted > 0


def test_without_one_there_is_none(bundles, tmp_path):
    export(bundles[1], tmp_path / "models", Serving())
    version = tmp_path / "models" / "plain" / "1"
    assert json.loads((version / "serve.json").read_text())["draft"] is None
    assert not (version / "draft").exists()


def test_an_engine_that_checks_no_drafts_is_refused(bundles, tmp_path):
    with pytest.raises(EngineMismatchError, match="the engine checks no drafts"):
        export(bundles[1], tmp_path / "models", Serving(draft=str(bundles[0])))


def test_an_engine_that_the_draft_has_not_is_refused(bundles, tmp_path):
    with pytest.raises(UnknownNameError, match="unknown engine 'int8'"):
        export(bundles[0], tmp_path / "models", Serving(draft=str(bundles[1]), draft_engine="int8"))


def test_a_draft_that_drops_tokens_is_not_for_it(bundles, tmp_path):
    with pytest.raises(EngineMismatchError, match="the engine drops nothing from its caches by window"):
        export(bundles[0], tmp_path / "models", Serving(draft=str(bundles[1]), evict="window"))


def test_an_engine_of_no_draft_is_refused():
    with pytest.raises(RecipeError, match="draft_engine names an engine of a draft, and there is none"):
        Serving(draft_engine="int8")


def test_counters_follow_the_counts():
    class Metric:
        def __init__(self, labels):
            self.labels, self.value = labels, 0

        def increment(self, number):
            self.value += number

    class Family:
        COUNTER = "counter"
        made: ClassVar[dict[str, Metric]] = {}

        def __init__(self, name, description, kind):
            self.name = name

        def Metric(self, labels):  # noqa: N802  Triton's name
            return self.made.setdefault(self.name, Metric(labels))

    counts = Speculation()
    counted = Counted(SimpleNamespace(MetricFamily=Family), "gpt", counts)
    for total in (Speculation(4, 3, 2, 5), Speculation(9, 5, 6, 11)):
        vars(counts).update(vars(total))
        counted()
        assert {name: Family.made[f"enginesmith_draft_{name}"].value for name in COUNTERS} == vars(total)
    assert Family.made["enginesmith_draft_calls"].labels == {"model": "gpt"}
