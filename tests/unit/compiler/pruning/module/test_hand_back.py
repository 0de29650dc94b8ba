from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import enginesmith
from enginesmith.compiler.pruning.module import check_module, check_pruned_weights
from enginesmith.compiler.recipe import make_recipe
from enginesmith.compiler.storage.files import sha256
from enginesmith.compiler.variants import not_written
from enginesmith.errors import RecipeError
from enginesmith.passes import parse_pass

FIELDS = {
    "inputs": ("input:1x12",),
    "dynamic": ("input:0=1..16..16",),
    "targets": ("onnxruntime-cpu",),
    "prune": "0.5",
    "pruned_weights": True,
    "pruning": {"multiple": 4, "sensitivity": False},
    "benchmark": False,
}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.npy"
    np.save(path, np.random.default_rng(0).standard_normal((64, 12)).astype(np.float32))
    return path


def compiled(module: nn.Module, data, output, **fields) -> enginesmith.Bundle:
    return enginesmith.compile(module, output, data=data, **{**FIELDS, **fields})


def prunings(bundle: enginesmith.Bundle) -> list[dict]:
    return [record for record in bundle.manifest["passes"] if record["text"].startswith("prune:")]


@pytest.mark.parametrize("importance", ["obs", "taylor"])
def test_the_bundle_holds_weights_and_mapping_beside_the_engine(importance, data, tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    pruning = {**FIELDS["pruning"], "importance": importance}
    bundle = compiled(module, data, tmp_path / "bundle", pruning=pruning)
    folder = "pruned/onnxruntime-cpu-fp32-pruned"
    (record,) = prunings(bundle)
    assert record["details"]["importance"] == importance
    assert record["details"]["pruned_weights"] == {"folder": folder, "reasons": []}
    for name in ("weights.safetensors", "mapping.json"):
        assert bundle.manifest["files"][f"{folder}/{name}"] == sha256(bundle.path / folder / name)
    smaller = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    smaller.load_state_dict(load_file(bundle.path / folder / "weights.safetensors"), strict=True)
    mapping = json.loads((bundle.path / folder / "mapping.json").read_text())
    assert mapping["engines"] == ["onnxruntime-cpu-fp32-pruned"]
    arrays = np.load(data)[:16]
    (found,) = bundle.load("onnxruntime-cpu-fp32-pruned").run({"input": arrays}).values()
    with torch.no_grad():
        np.testing.assert_allclose(smaller(torch.from_numpy(arrays)).numpy(), found, rtol=1e-4, atol=1e-5)


def test_weights_that_cannot_be_told_are_noted_and_not_written(data, tmp_path):
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.root, self.last = nn.Linear(12, 16), nn.Parameter(torch.randn(16, 16)), nn.Linear(16, 3)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.last((self.first(input).relu() @ (self.root * 2)).relu())

    bundle = compiled(Doubled(), data, tmp_path / "bundle")
    reason = "root: no constant of the graph has its values"
    assert prunings(bundle)[0]["details"]["pruned_weights"] == {"folder": None, "reasons": [reason]}
    assert not (bundle.path / "pruned").exists()
    note = f"the weights of onnxruntime-cpu-fp32-pruned are not written: {reason}"
    assert note in bundle.manifest["verdict"]["notes"]


def test_nothing_is_written_where_nobody_asked(data, tmp_path):
    bundle = compiled(
        nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)), data, tmp_path / "b", pruned_weights=False
    )
    assert "pruned_weights" not in prunings(bundle)[0]["details"]
    assert not (bundle.path / "pruned").exists()
    assert not_written(bundle.manifest["passes"]) == []


def test_pruned_weights_need_a_pruned_engine():
    with pytest.raises(RecipeError, match="pruned_weights writes the weights of pruned engines"):
        check_pruned_weights(make_recipe({"pruned_weights": True}))
    check_pruned_weights(make_recipe({"pruned_weights": True, "prune": "0.3"}))


def test_pruned_weights_need_a_torch_module(prune):
    found = prune(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), (5, 12))
    recipe = make_recipe({"model": "m.onnx", "pruned_weights": True, "prune": "0.3"})
    with pytest.raises(RecipeError, match="pruned weights are a state_dict, and there is no torch module") as error:
        check_module(recipe, dataclasses.replace(found.model, kind="onnx"))
    assert error.value.found == "m.onnx, of kind onnx"
    check_module(recipe, found.model)


@pytest.mark.parametrize(("importance", "differentiates"), [("taylor", True), ("auto", False), ("obs", False)])
def test_gradients_are_asked_for_by_importance(importance, differentiates):
    rewrite = parse_pass(f"prune:ratio=0.3,importance={importance}")
    assert rewrite.differentiates is differentiates
    assert rewrite.calibrates is (importance != "auto")
