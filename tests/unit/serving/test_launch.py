from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from enginesmith.errors import TargetUnavailableError
from enginesmith.serving import fallback, launch
from enginesmith.serving.endpoint import Endpoint
from enginesmith.serving.launch import Watching, prepare
from enginesmith.serving.settings import Serving

HELPERS = Path(__file__).parents[2]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """What is started where no Triton can run."""

    def refuse(scratch):
        raise TargetUnavailableError("no Triton can run here", found="PATH: no tritonserver")

    def prepared(
        installed: bool = True, bundles: str = "small_bundles", settings: Serving | None = None, **endpoint: object
    ):
        monkeypatch.setattr(launch, "find", refuse)
        monkeypatch.setattr(fallback, "is_installed", lambda: installed)
        runpy.run_path(str(HELPERS / f"{bundles}.py"))["write_bundle"](tmp_path / "net")
        told: list[str] = []
        listens = Endpoint(**{"port": 1, "metrics_port": 2, **endpoint})
        asked = settings or Serving()
        made = prepare(tmp_path / "net", tmp_path, asked, listens, Watching(), None, "p", told.append)
        return made, told

    return prepared


def test_without_a_triton_kserve_serves_and_says_that_it_does_not_merge(start):
    made, told = start()
    assert (made.what, made.model, made.repository) == ("kserve, without merging", "net", None)
    (warning,) = told
    assert warning.startswith("warning: no Triton can run here (PATH: no tritonserver); the package kserve serves")
    assert "does not merge requests" in warning


def test_options_that_kserve_has_not_are_named(start):
    _, told = start(settings=Serving(timeout_ms=5.0, max_queue=4, instances=2))
    assert told[1:] == ["warning: kserve takes no notice of --timeout-ms, --instances"]


@pytest.mark.parametrize("options", [{"installed": False}, {"host": "0.0.0.0"}, {"http_port": 3}])
def test_without_kserve_on_an_open_address_or_with_http_nothing_serves(start, options):
    with pytest.raises(TargetUnavailableError, match="no Triton can run here"):
        start(**options)


def test_nothing_but_a_triton_serves_a_language_model(start):
    with pytest.raises(TargetUnavailableError, match="no Triton can run here") as caught:
        start(bundles="small_decoder")
    assert caught.value.hint == "kserve cannot send the tokens of a language model one by one"
