"""Which layers may leave attention to one operator, and what is written where."""

from __future__ import annotations

import functools
import runpy
from pathlib import Path

import pytest
import torch
import transformers

from enginesmith.compiler.sources import load_model
from enginesmith.compiler.sources.decoders.module import keeping
from enginesmith.compiler.sources.decoders.writing import InPlace, Single, plain_layers
from enginesmith.targets.inductor.operators import attend

random = runpy.run_path(str(Path(__file__).parents[4] / "random_model.py"))["random"]
SIZES = {"vocab_size": 61, "bos_token_id": None, "eos_token_id": None}
LENGTH, PAST = 12, 5
DEEPSEEK = {
    "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
QWEN = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4), {0, 1}),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**SIZES, **QWEN), {0, 1}),
    "bloom": (
        transformers.BloomForCausalLM,
        transformers.BloomConfig(**SIZES, hidden_size=32, n_layer=2, n_head=4),
        set(),
    ),
    "deepseek": (transformers.DeepseekV3ForCausalLM, transformers.DeepseekV3Config(**SIZES, **DEEPSEEK), set()),
}


@pytest.mark.parametrize("name", MODELS)
def test_calls_write_into_their_caches_and_give_what_copies_give(name):
    kind, config, plain = MODELS[name]
    model = load_model(random(functools.partial(kind, config)), decoder={"max_length": LENGTH, "batch": 2})
    torch.manual_seed(0)
    numbers = torch.tensor([[7], [9]]), torch.tensor([PAST, 2]), torch.tensor([1, 1])
    shapes = [(2, *spec.shape[1:]) for spec in model.signature.inputs[3:]]
    caches = [torch.randn(shape) for shape in shapes]
    call = functools.partial(model.module, *numbers)
    expected = call(*caches)
    layers = plain_layers(lambda: call(*caches))
    assert layers == plain
    for rows in (InPlace, functools.partial(Single, layers=layers, operator=attend)):
        given = [cache.clone() for cache in caches]
        with torch.no_grad(), keeping(rows):
            found = call(*given)
        torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-4)
        for cache, written, before in zip(given, expected[1:], caches, strict=True):
            torch.testing.assert_close(cache, written, atol=1e-5, rtol=1e-5)
            assert torch.equal(cache[0, :, PAST + 1 :], before[0, :, PAST + 1 :])
            assert not torch.equal(cache[0, :, PAST], before[0, :, PAST])


class Write(torch.nn.Module):
    """Two new tokens of each of two rows, of which one cache is of another precision."""

    def forward(
        self, entries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, new: torch.Tensor
    ) -> torch.Tensor:
        written = InPlace(entries, [keys], [values]).update(new, new, 0)
        return written[0] + written[1]


def test_caches_themselves_are_written_and_no_views_of_them():
    """So that TorchInductor of every version knows that no copy is needed."""
    given = torch.tensor([[4, 5], [0, 1]]), torch.randn(2, 3, 8, 4), torch.randn(2, 3, 8, 4).half()
    new = torch.randn(2, 3, 2, 4)
    copies = [cache.clone() for cache in given[1:]]
    program = torch.export.export(Write(), (*given, new), strict=False)
    written = [node.args[0] for node in program.graph.nodes if node.target is torch.ops.aten.index_put_.default]
    assert [node.op for node in written] == ["placeholder"] * 2
    program.module()(*given, new)
    for cache, copy in zip(given[1:], copies, strict=True):
        copy[0, :, 4:6], copy[1, :, :2] = new.to(copy.dtype)
        assert torch.equal(cache, copy)
