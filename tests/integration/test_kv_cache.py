"""Language models whose caches are kept in 8 bits: a quarter of the memory, nearly the same logits."""

from __future__ import annotations

import json
import queue
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import enginesmith
from enginesmith.compiler.generation.choice import Choice
from enginesmith.compiler.generation.continuous import Request
from enginesmith.compiler.states import in_eight_bits
from enginesmith.errors import RecipeError
from enginesmith.targets._onnxruntime_states import StatesRunner
from enginesmith.targets.base import EngineInfo

random = runpy.run_path(str(Path(__file__).parents[1] / "random_model.py"))["random"]

LENGTH, VOCABULARY = 64, 61
SIZES = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
NAME = "onnxruntime-cpu-fp32"


def llama() -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SIZES, max_position_embeddings=LENGTH, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip


def gpt2() -> transformers.PreTrainedModel:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SIZES, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4)
    )


@pytest.fixture(scope="module", params=[gpt2, pytest.param(llama, marks=pytest.mark.slow)])
def compiled(request, tmp_path_factory):
    """The model, some texts, and its bundle."""
    root = tmp_path_factory.mktemp("kv")
    model = random(request.param, 0.2)
    texts = np.random.default_rng(0).integers(0, VOCABULARY, (16, LENGTH))
    np.savez(root / "texts.npz", ids=texts)
    bundle = enginesmith.compile(
        model,
        root / "bundle",
        decoder={"max_length": LENGTH, "batch": 3},
        data=str(root / "texts.npz"),
        targets=["onnxruntime-cpu:threads=1"],
        precisions=["fp32"],
        passes=["simplify", "dedupe", "fuse-attention", "kv-cache"],
        benchmark=False,
    )
    return model, texts, bundle


def test_the_engine_is_right_and_its_caches_take_a_quarter(compiled):
    model, _, bundle = compiled
    assert bundle.passed, bundle.manifest["verdict"]["reasons"]
    (record,) = bundle.manifest["engines"]
    assert record["details"]["in_place"] is True
    info = EngineInfo.read(bundle.path / "engines" / NAME)
    assert set(in_eight_bits(info.signature)) == set(info.signature.states)
    heads = getattr(model.config, "num_key_value_heads", 4)
    assert record["details"]["cache_row_bytes"] == 2 * 2 * heads * LENGTH * 16  # layers, keys and values; 64 / 4 heads
    (stored,) = (entry for entry in bundle.manifest["passes"] if entry["text"] == "kv-cache")
    assert stored["changes"] == {"caches stored in 8 bits": 4}
    assert all(0 < error < 0.05 for error in stored["details"]["errors"].values())
    assert f"engines/{NAME}/scales.npz" in json.loads((bundle.path / "manifest.json").read_text())["files"]
    judged = {output["output"]: output["relative_l2"] for output in record["validation"]["outputs"]}
    assert 1e-4 < judged["logits"] < 0.08
    assert all(1e-4 < judged[output] < 0.08 for output in info.signature.states.values())


def test_texts_are_as_likely_as_the_model_says(compiled):
    model, texts, bundle = compiled
    with torch.inference_mode():
        ids = torch.from_numpy(texts[:3])
        logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = -torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").numpy()
    with bundle.load() as engine:
        found = np.concatenate(engine.log_likelihoods(list(texts[:3])))
    assert found == pytest.approx(expected, abs=float(0.05 * np.abs(expected).mean()))
    assert not np.allclose(found, expected, rtol=0, atol=1e-5)  # it is the rounded caches that were read


def test_rows_batchers_and_prefixes_give_the_same_tokens(compiled):
    _, texts, bundle = compiled
    prompts = [texts[0, :20].tolist(), texts[1, :5].tolist(), texts[2, :11].tolist()]
    with bundle.load() as engine:
        assert isinstance(engine._runner, StatesRunner)
        alone = [engine.generate(prompt, 12)[0] for prompt in prompts]
        assert engine.generate(prompts, 12) == alone
        batcher, done = engine.batcher(), queue.SimpleQueue()
        found = [[] for _ in prompts]
        for tokens, prompt in zip(found, prompts, strict=True):
            batcher.submit(Request(np.array(prompt), 12, Choice(None), (), tokens.append, done.put))
        batcher.close()
        assert found == alone
        known = enginesmith.Prefixes(1 << 20)
        engine.generate([*prompts[0][:15], 3], 1, prefixes=known)
        assert engine.generate(prompts[0], 12, prefixes=known) == alone[:1]
        assert known.reused == 15


def test_without_data_it_is_refused_before_any_work(tmp_path):
    with pytest.raises(RecipeError, match="pass kv-cache needs calibration data, to see what tensors hold"):
        enginesmith.compile(
            random(gpt2),
            tmp_path / "bundle",
            decoder={"max_length": LENGTH, "batch": 2},
            targets=["onnxruntime-cpu"],
            precisions=["fp32"],
            passes=["kv-cache"],
            benchmark=False,
        )
