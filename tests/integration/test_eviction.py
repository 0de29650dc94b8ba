"""Texts longer than the cache: the tokens of transformers whose own cache is cut by hand after the same rule."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import enginesmith
from enginesmith.compiler.engine import engine_info
from enginesmith.compiler.generation.choice import Choice
from enginesmith.compiler.generation.continuous import Request
from enginesmith.errors import DataError, EngineMismatchError, RecipeError
from enginesmith.serving.repository import export
from enginesmith.serving.settings import Serving

random = runpy.run_path(str(Path(__file__).parents[1] / "random_model.py"))["random"]

ROOM, SINKS, LONGEST = 32, 3, 96
KEPT = 24
NEWEST = 10  # half of what stays beside the sinks
SIZES = {"vocab_size": 61, "bos_token_id": None, "eos_token_id": None}
PROMPT = np.random.default_rng(3).integers(0, 61, 11).tolist()
NEW = 70


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SIZES, max_position_embeddings=LONGEST, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager",
        )
    )  # fmt: skip


def gpt2():
    config = transformers.GPT2Config(
        **SIZES, n_positions=LONGEST, n_embd=32, n_layer=2, n_head=4, attn_implementation="eager"
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture(scope="module", params=["llama-window", "llama-importance", "gpt2-importance"])
def case(request, tmp_path_factory):
    name, policy = request.param.split("-")
    model = random({"llama": llama, "gpt2": gpt2}[name])
    bundle = enginesmith.compile(
        model,
        tmp_path_factory.mktemp("evict") / "bundle",
        decoder={"max_length": ROOM, "batch": 3, "eviction": policy},
        targets=["onnxruntime-cpu"],
        passes=["simplify", "dedupe", "fuse-attention"],
        benchmark=False,
        max_samples=2,
    )
    record = bundle.manifest["engines"][0]
    assert record["validation"]["passed"]
    assert engine_info(bundle.path, record["name"]).details["in_place"]
    with bundle.load(record["name"]) as engine:
        yield model, engine, enginesmith.Eviction(policy, SINKS), bundle


def cut(model, prompt: list[int], count: int, policy: str) -> list[int]:
    """Greedy search with transformers' cache, from which the rule of eviction.py takes entries, written once more."""
    cache = transformers.DynamicCache()
    with torch.no_grad():
        first = model(torch.tensor([prompt]), past_key_values=cache, output_attentions=True)
    sums = [_by_head(cache, layer, got) for layer, got in enumerate(first.attentions)]
    found, logits = [], first.logits[0, -1]
    while True:
        found.append(int(logits.argmax()))
        if len(found) == count:
            return found
        if sums[0].shape[1] == ROOM:
            for layer, total in enumerate(sums):
                stays = torch.stack([_stays(row, policy) for row in total])
                held = cache.layers[layer]
                index = stays[None, :, :, None]
                held.keys = held.keys.gather(2, index.expand(-1, -1, -1, held.keys.shape[3]))
                held.values = held.values.gather(2, index.expand(-1, -1, -1, held.values.shape[3]))
                sums[layer] = total.gather(1, stays)
        place = torch.tensor([[len(prompt) + len(found) - 1]])
        with torch.no_grad():
            step = model(
                torch.tensor([[found[-1]]]), past_key_values=cache, position_ids=place, output_attentions=True,
                attention_mask=torch.ones(1, 1, 1, sums[0].shape[1] + 1, dtype=torch.bool),
            )  # fmt: skip
        for layer, got in enumerate(step.attentions):
            sums[layer] = torch.nn.functional.pad(sums[layer], (0, 1)) + _by_head(cache, layer, got)
        logits = step.logits[0, -1]


def _by_head(cache, layer: int, weights: torch.Tensor) -> torch.Tensor:
    """Attention (1, heads, time, entries) as what each entry got, (heads of keys, entries)."""
    got = weights[0].sum(1)
    return got.reshape(cache.layers[layer].keys.shape[1], -1, got.shape[1]).sum(1)


def _stays(total: torch.Tensor, policy: str) -> torch.Tensor:
    entries = list(range(ROOM))
    if policy == "window":
        return torch.tensor([*entries[:SINKS], *entries[-(KEPT - SINKS) :]])
    old = sorted(entries[SINKS:-NEWEST], key=lambda entry: (-float(total[entry]), entry))
    return torch.tensor([*entries[:SINKS], *sorted(old[: KEPT - SINKS - NEWEST]), *entries[-NEWEST:]])


def test_tokens_are_those_of_a_cache_cut_by_hand(case):
    model, engine, eviction, _ = case
    (found,) = engine.generate([PROMPT], NEW, eviction=eviction)
    assert found == cut(model, PROMPT, NEW, eviction.policy)
    assert len(set(found)) > 5


def test_rows_do_not_depend_on_each_other(case):
    _, engine, eviction, _ = case
    prompts = [PROMPT, [7], np.random.default_rng(4).integers(0, 61, 50).tolist()]
    alone = [engine.generate([prompt], 40, eviction=eviction)[0] for prompt in prompts]
    assert engine.generate(prompts, 40, eviction=eviction) == alone
    with_others = {}
    batcher = engine.batcher(eviction=eviction)
    for number, prompt in enumerate(prompts):
        tokens = with_others.setdefault(number, [])
        batcher.submit(Request(np.array(prompt), 40 - number, Choice(None), (), tokens.append, lambda error: None))
    batcher.close()
    assert [with_others[number] for number in range(3)] == [row[: 40 - number] for number, row in enumerate(alone)]


def test_nothing_changes_while_the_cache_is_not_full(case):
    _, engine, eviction, _ = case
    assert engine.generate([PROMPT], 20, eviction=eviction) == engine.generate([PROMPT], 20)


def test_perplexity_of_texts_longer_than_the_cache(case):
    _, engine, eviction, _ = case
    text = np.random.default_rng(5).integers(0, 61, LONGEST).tolist()
    assert engine.perplexity([text[:ROOM]], eviction) == engine.perplexity([text[:ROOM]])
    (values,) = engine.log_likelihoods([text], eviction)
    assert len(values) == LONGEST - 1
    assert np.isfinite(values).all()


def test_what_cannot_be(case):
    _, engine, eviction, _ = case
    with pytest.raises(
        DataError, match=r"(?s)leaves no room for 30 new tokens in the cache.*let a full cache drop tokens"
    ):
        engine.generate([PROMPT], 30)
    with pytest.raises(DataError, match="leaves no room for 90 new tokens in what the model was made for"):
        engine.generate([PROMPT], 90, eviction=eviction)
    with pytest.raises(DataError, match="text 0 is longer than what the model was made for"):
        engine.perplexity([[1] * (LONGEST + 1)], eviction)
    with pytest.raises(RecipeError, match="prefixes need caches that hold the whole text"):
        engine.batcher(prefixes=enginesmith.Prefixes(1 << 20), eviction=eviction)
    with pytest.raises(RecipeError, match="draft need caches that hold the whole text"):
        engine.generate([PROMPT], 4, eviction=eviction, draft=engine)
    with pytest.raises(RecipeError, match="sinks of eviction leave no room"):
        engine.generate([PROMPT], 4, eviction=enginesmith.Eviction("window", KEPT))
    if eviction.policy == "window":
        with pytest.raises(EngineMismatchError, match="drops nothing from its caches by importance"):
            engine.generate([PROMPT], 4, eviction=enginesmith.Eviction("importance"))


def test_a_service_drops_tokens_where_it_is_asked_to(case, tmp_path):
    *_, eviction, bundle = case
    found = export(bundle.path, tmp_path, Serving(evict=eviction.policy, name="small"))
    assert json.loads((found.config.parent / "1" / "serve.json").read_text())["evict"] == eviction.policy
    with pytest.raises(RecipeError, match="prefixes need caches that hold the whole text"):
        export(bundle.path, tmp_path / "other", Serving(evict=eviction.policy, prefix_mib=1))
