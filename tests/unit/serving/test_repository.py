from __future__ import annotations

import errno
import json
import os
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest

import enginesmith
from enginesmith.errors import EngineError, EngineMismatchError, OutputError, RecipeError, UnknownNameError, UsageError
from enginesmith.serving.native import engine_files, native
from enginesmith.serving.repository import export
from enginesmith.serving.settings import Serving
from enginesmith.targets.base import EngineInfo

small = runpy.run_path(str(Path(__file__).parents[2] / "small_bundles.py"))


@pytest.fixture
def bundle(tmp_path):
    return small["write_bundle"](tmp_path / "net", {"slow": "", "fast": ""}, times_ms={"slow": 2.0, "fast": 1.0})


def change(bundle: Path, **facts) -> None:
    """Changes the description of the fastest engine, and its hash."""
    file = bundle / "engines" / "fast" / "engine.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **facts}))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["engines/fast/engine.json"] = small["hashes"](bundle)["engines/fast/engine.json"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_the_best_engine_goes_into_the_repository_and_needs_the_bundle_no_more(bundle, tmp_path):
    found = export(bundle, tmp_path / "models", Serving())
    assert (found.name, found.engine, found.merged) == ("net", "fast", 8)
    shutil.rmtree(bundle)
    wanted = json.loads((tmp_path / "models/net/1/serve.json").read_text())
    with enginesmith.load(tmp_path / "models/net/1" / wanted["bundle"], wanted["engine"]) as engine:
        x = np.ones((2, 4), np.float32)
        np.testing.assert_allclose(engine(x=x)[0], small["network"](x)["left"], rtol=1e-5)
    assert not (tmp_path / "models/net/1/bundle/engines/slow").exists()


@pytest.mark.parametrize("possible", [True, False], ids=["same file system", "another file system"])
def test_a_linked_engine_is_not_copied_where_that_can_be_and_stays_when_the_bundle_goes(
    bundle, tmp_path, monkeypatch, possible
):
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if not possible:
        monkeypatch.setattr(os, "link", refuse)
    found = export(bundle, tmp_path / "models", Serving(engine="slow"), link=True)
    home = found.config.parent / "1" / "bundle"
    files = [folder / "engines/slow/model.onnx" for folder in (bundle, home)]
    assert files[0].samefile(files[1]) == possible
    assert json.loads((home.parent / "serve.json").read_text())["path"]
    shutil.rmtree(bundle)
    with enginesmith.load(home, "slow") as engine:
        assert engine(x=np.ones((1, 4), np.float32))[0].shape == (1, 3)


def test_an_engine_to_serve_here_has_to_run_here(bundle, tmp_path):
    change(bundle, requires={"machine": "s390x"})
    assert export(bundle, tmp_path / "models", Serving()).engine == "fast"
    assert export(bundle, tmp_path / "models", Serving(), link=True).engine == "slow"
    with pytest.raises(EngineMismatchError, match="engine fast was built for another machine"):
        export(bundle, tmp_path / "models", Serving(engine="fast"), link=True)


def test_warm_up_is_one_row_of_a_recorded_sample(bundle, tmp_path):
    export(bundle, tmp_path / "models", Serving())
    row = np.fromfile(tmp_path / "models/net/warmup/input-0.raw", np.float32)
    assert (row == small["samples"]()[0][0]).all()
    assert "model_warmup" in (tmp_path / "models/net/config.pbtxt").read_text()


def test_a_bundle_without_a_record_has_no_warm_up(bundle, tmp_path):
    shutil.rmtree(bundle / "reference")
    export(bundle, tmp_path / "models", Serving())
    assert "model_warmup" not in (tmp_path / "models/net/config.pbtxt").read_text()


def curve(engine: str, best: int) -> dict:
    rates = [{"batch": batch, "samples_per_s": 2.0 if batch == best else 1.0, "p99_ms": 1.0} for batch in (1, 2, 4, 8)]
    return {"engine": engine, "points": rates, "p99_limit_ms": None, "best": best}


def test_the_best_batch_of_the_search_is_preferred(bundle, tmp_path):
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["batches"] = [curve("fast", 4), curve("slow", 2)]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    text = export(bundle, tmp_path / "models", Serving()).config.read_text()
    assert "preferred_batch_size: [4]" in text
    assert "preferred_batch_size: [8]" in export(bundle, tmp_path / "m", Serving(preferred=(8,))).config.read_text()


def test_one_of_ours_is_replaced_and_nothing_else(bundle, tmp_path):
    models = tmp_path / "models"
    export(bundle, models, Serving())
    export(bundle, models, Serving(engine="slow"))
    assert 'string_value: "slow"' in (models / "net/config.pbtxt").read_text()
    export(bundle, models, Serving(name="other"))
    assert {path.name for path in models.iterdir()} == {"net", "other"}
    (models / "mine").mkdir()
    with pytest.raises(OutputError, match="mine holds something else than a model of enginesmith's"):
        export(bundle, models, Serving(name="mine"))


def test_a_failure_leaves_nothing(bundle, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(EngineError, match=r"full|No space"):
        export(bundle, tmp_path / "models", Serving())
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"engine": "fist"}, UnknownNameError, "unknown engine 'fist'"),
        ({"max_batch": 9}, UsageError, "max_batch is more than fast takes"),
        ({"preferred": (9,)}, UsageError, "preferred is more than fast takes"),
        ({"preferred": (8,), "max_batch": 4}, UsageError, "preferred is more than fast takes"),
        ({"gpus": (0,)}, UsageError, "engine fast runs on the CPU"),
    ],
)
def test_settings_that_the_engine_does_not_take(bundle, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        export(bundle, tmp_path / "models", Serving(**settings))
    assert not (tmp_path / "models").exists()


def test_an_engine_that_carries_state(bundle, tmp_path):
    change(bundle, stateful=True)
    with pytest.raises(UsageError, match="engine fast carries state from one call to the next"):
        export(bundle, tmp_path / "models", Serving())


def test_an_engine_that_was_changed(bundle, tmp_path):
    with (bundle / "engines/fast/model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(EngineMismatchError, match="changed after it was written"):
        export(bundle, tmp_path / "models", Serving())


def test_a_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(UsageError, match="is not a bundle"):
        export(tmp_path, tmp_path / "models", Serving())


def test_a_bundle_whose_folder_is_no_name_of_a_model(tmp_path):
    bundle = small["write_bundle"](tmp_path / "my net")
    with pytest.raises(RecipeError, match="the model cannot have this name"):
        export(bundle, tmp_path / "models", Serving())
    assert export(bundle, tmp_path / "models", Serving(name="my_net")).name == "my_net"


def test_sizes_for_a_model_that_is_not_merged(tmp_path):
    bundle = small["write_bundle"](tmp_path / "net", described=small["signature"](2, 4, 8))
    assert "takes no batch below 2" in export(bundle, tmp_path / "models", Serving()).reason
    with pytest.raises(UsageError, match="requests to plain cannot be merged: the engine takes no batch below 2"):
        export(bundle, tmp_path / "models", Serving(max_batch=4))


def test_the_native_form_is_the_engine_and_what_lies_beside_it(bundle, tmp_path):
    (bundle / "engines/fast/model.onnx.data").write_bytes(b"weights")
    export(bundle, tmp_path / "models", Serving(), "native")
    files = {path.name for path in (tmp_path / "models/net/1").iterdir()}
    assert files == {"model.onnx", "model.onnx.data"}
    text = (tmp_path / "models/net/config.pbtxt").read_text()
    assert 'platform: "onnxruntime_onnx"' in text
    assert 'key: "intra_op_thread_count" value { string_value: "1" }' in text


def test_engines_that_no_backend_runs_by_itself(bundle):
    info = EngineInfo.read(bundle / "engines" / "fast")
    other = EngineInfo(**{**vars(info), "target": "torchscript"})
    with pytest.raises(UsageError, match="engine fast is for no backend of Triton's own"):
        native(other)
    plan = native(EngineInfo(**{**vars(info), "target": "tensorrt", "entry": "model.plan"}))
    assert (plan.backend, plan.file) == ("tensorrt", "model.plan")


def test_descriptions_are_no_part_of_an_engine(bundle):
    folder = bundle / "engines" / "fast"
    (folder / "build.log").write_text("")
    assert [path.name for path in engine_files(folder)] == ["model.onnx"]


@pytest.mark.parametrize("option", [{"prefix_mib": 1}, {"evict": "window"}, {"draft": "BUNDLE"}])
def test_options_of_language_models_are_for_them_alone(bundle, tmp_path, option):
    option = {name: str(bundle) if value == "BUNDLE" else value for name, value in option.items()}
    with pytest.raises(UsageError, match=f"{next(iter(option))} is for language models with their cache"):
        export(bundle, tmp_path / "models", Serving(**option))
