"""Language models of transformers, compiled with their cache: the same tokens as transformers' own greedy search."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import enginesmith
from enginesmith.targets._onnxruntime_states import StatesRunner

random = runpy.run_path(str(Path(__file__).parents[1] / "random_model.py"))["random"]

LENGTH = 288
SIZES = {"vocab_size": 61, "max_position_embeddings": LENGTH, "bos_token_id": None, "eos_token_id": None}
LLAMA = {**SIZES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7, 1, 8, 2]]


def llama() -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, **HEADS))


def gpt2() -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=LENGTH, n_embd=32, n_layer=1, n_head=4, bos_token_id=None, eos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config)


def qwen3() -> transformers.PreTrainedModel:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA, **HEADS, head_dim=16))


def deepseek() -> transformers.PreTrainedModel:
    sizes = {**LLAMA, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = transformers.DeepseekV3Config(
        **sizes, moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, n_group=2,
        topk_group=1, kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8,
        first_k_dense_replace=1,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


FUSED = {"llama": 1, "gpt2": 0, "qwen3": 1, "deepseek": 0}
"""Attentions that are fused. GPT-2 is compiled as captured; DeepSeek's keys are computed from what is cached."""


def answers(model: transformers.PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """Transformers' greedy search."""
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return found[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compiles a model of that name once: Llama from a folder of transformers, the others as modules."""
    found = {}

    def compile(name):
        if name in found:
            return found[name]
        root = tmp_path_factory.mktemp(name)
        model = random(globals()[name])
        model.save_pretrained(root / "model")
        passes = ["simplify", "dedupe", *(["fuse-attention"] if name != "gpt2" else [])]
        bundle = enginesmith.compile(
            root / "model" if name == "llama" else model,
            root / "bundle",
            decoder={"max_length": LENGTH, "batch": 4},
            precisions=["fp32"],
            targets=["onnxruntime-cpu:threads=1"],
            passes=passes,
            benchmark=False,
        )
        return found.setdefault(name, (model, bundle))

    return compile


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", pytest.param("qwen3", marks=pytest.mark.slow), pytest.param("deepseek", marks=pytest.mark.slow)],
)
def test_tokens_are_those_of_transformers(compiled, name):
    model, bundle = compiled(name)
    assert bundle.passed, bundle.manifest["verdict"]["reasons"]
    operators = bundle.manifest["engines"][0]["details"]["operators"]
    assert operators.get("GroupQueryAttention", 0) == FUSED[name]
    with bundle.load() as engine:
        assert isinstance(engine._runner, StatesRunner)  # its caches are updated in place
        (found,) = engine.generate(PROMPTS[0], 256)
        assert found == answers(model, PROMPTS[0], 256)
        assert len(set(found)) > 4
        together = engine.generate(PROMPTS, 24)
        assert together == [engine.generate(prompt, 24)[0] for prompt in PROMPTS]
        assert together == [answers(model, prompt, 24) for prompt in PROMPTS]


def test_what_lies_in_a_cache_behind_its_tokens_does_not_matter(compiled):
    _, bundle = compiled("llama")
    with bundle.load() as engine:
        steps = engine._runner.steps(1)
        ids, past, count = np.array([PROMPTS[0]]), np.array([0]), np.array([len(PROMPTS[0])])
        clean = steps(ids, past, count).copy()
        for cache in steps.caches.values():
            cache[:, :, len(PROMPTS[0]) :] = 1e6
        again = steps(ids[:, -1:], count - 1, np.array([1]))
        assert again == pytest.approx(clean, rel=1e-4, abs=1e-4)


def test_the_model_that_was_given_still_runs_by_itself(compiled):
    model, _ = compiled("gpt2")
    assert model.config._attn_implementation != "enginesmith"
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 61)


def test_the_bundle_says_which_outputs_are_caches(compiled):
    _, bundle = compiled("llama")
    described = json.loads((bundle.path / "engines/onnxruntime-cpu-fp32/engine.json").read_text())
    states = described["signature"]["states"]
    assert states == {"key.0": "key.0_out", "value.0": "value.0_out"}
    assert json.loads((bundle.path / "text/generation.json").read_text()) == {"stop": []}
    assert not Path(bundle.path / "text/tokenizer.json").exists()
