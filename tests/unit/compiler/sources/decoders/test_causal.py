import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from enginesmith.compiler.generation.generate import check_decoder
from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.compiler.sources.decoders.causal import open_folder
from enginesmith.compiler.sources.decoders.detect import is_causal
from enginesmith.compiler.sources.decoders.module import Decoder
from enginesmith.compiler.states import completed
from enginesmith.errors import RecipeError, SourceError, UnknownNameError

SIZES = {"vocab_size": 43, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
DENSE = {**SIZES, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


def gpt2(**changes):
    sizes = {"vocab_size": 43, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, **changes}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, eos_token_id=1, **sizes))


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**DENSE, **HEADS, **changes}))


def qwen2():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**DENSE, **HEADS))


def qwen3():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DENSE, **HEADS, head_dim=8))


def mistral(**changes):
    return transformers.MistralForCausalLM(transformers.MistralConfig(**DENSE, **HEADS, **changes))


def deepseek():
    config = transformers.DeepseekV3Config(
        **DENSE, num_attention_heads=4, num_key_value_heads=4, moe_intermediate_size=8, n_routed_experts=8,
        num_experts_per_tok=2, n_shared_experts=1, n_group=2, topk_group=1, kv_lora_rank=12, q_lora_rank=8,
        qk_rope_head_dim=4, v_head_dim=4, qk_nope_head_dim=4, first_k_dense_replace=1,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def bloom():
    return transformers.BloomForCausalLM(transformers.BloomConfig(
        vocab_size=43, hidden_size=24, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=1, initializer_range=0.3,
    ))  # fmt: skip


def mpt():
    return transformers.MptForCausalLM(transformers.MptConfig(
        vocab_size=43, d_model=24, n_layers=2, n_heads=3, max_seq_len=32, expansion_ratio=2, initializer_range=0.3,
    ))  # fmt: skip


def call(model, ids, past, caches=None):
    """One call of the reference on a single row."""
    empty = {s.name: np.zeros((1, *s.shape[1:]), np.float32) for s in model.signature.inputs[3:]}
    numbers = {"ids": np.array([ids]), "past": np.array([past]), "count": np.array([len(ids)])}
    outputs = model.reference.run({**numbers, **(caches or empty)})
    return outputs["logits"], {name: outputs[output] for name, output in model.signature.states.items()}


@pytest.mark.parametrize("make", [gpt2, llama, qwen2, qwen3, mistral, deepseek, bloom, mpt])
def test_logits_are_those_without_a_cache(make):
    torch.manual_seed(0)
    original = make().eval()
    model = load_model(original, decoder={"max_length": 24, "batch": 3})
    tokens = np.random.default_rng(0).integers(0, 43, 12).tolist()
    with torch.no_grad():
        expected = original(torch.tensor([tokens])).logits[0].numpy()
    logits, caches = call(model, tokens[:5], 0)
    assert logits == pytest.approx(expected[4:5], abs=1e-4)
    logits, caches = call(model, tokens[5:9], 5, caches)
    assert logits == pytest.approx(expected[8:9], abs=1e-4)
    for at in range(9, 12):
        logits, caches = call(model, tokens[at : at + 1], at, caches)
        assert logits == pytest.approx(expected[at : at + 1], abs=1e-4)


@pytest.mark.parametrize("make", [bloom, mpt])
def test_biases_depend_on_the_distance_of_tokens(make):
    """The model itself attends otherwise where they are taken away, so that they are what is compared above."""
    torch.manual_seed(0)
    original = make().eval()
    decoder = Decoder(original, 24)
    (part,) = (part for part in decoder.model.modules() if type(part).__name__ in ("BloomModel", "MptModel"))
    build = "build_alibi_tensor" if make is bloom else "build_mpt_alibi_tensor"
    slopes = getattr(part, build).args[0]
    assert slopes.shape == (3, 1, 1)
    assert len(slopes.unique()) == 3
    ids = torch.arange(6)[None]
    caches = [[torch.zeros(1, 3, 24, 8)] * 2 for _ in range(2)]
    numbers = torch.tensor([0]), torch.tensor([6])
    with torch.no_grad():
        expected = original(ids).logits[0, -1]
        assert decoder(ids, *numbers, *caches)["logits"][0] == pytest.approx(expected, abs=1e-4)
        slopes.zero_()
        assert (decoder(ids, *numbers, *caches)["logits"][0] - expected).abs().max() > 1e-2


@pytest.mark.parametrize("make", [bloom, mpt])
def test_models_with_biases_drop_no_tokens(make):
    with pytest.raises(RecipeError, match="cannot drop tokens: its bias is computed from where a key stands"):
        load_model(make(), decoder={"eviction": "window"})


def test_mpt_says_for_how_many_tokens_it_was_made():
    assert load_model(mpt()).signature.axes["time"].max == 32
    with pytest.raises(RecipeError, match="max_length=64 is more than MptForCausalLM was made for"):
        load_model(mpt(), decoder={"max_length": 64})


@pytest.mark.parametrize("make", [gpt2, llama])
def test_logits_of_several_tokens_are_those_that_follow_each(make):
    torch.manual_seed(0)
    original = make().eval()
    model = load_model(original, decoder={"max_length": 24, "batch": 3, "speculative_tokens": 4})
    tokens = np.random.default_rng(0).integers(0, 43, (2, 6))
    with torch.no_grad():
        expected = original(torch.from_numpy(tokens)).logits.numpy()
    inputs = completed(model.signature, {"ids": tokens})
    inputs |= {"count": np.array([6, 4]), "back": np.array([3, 0, 1])}
    found = model.reference.run(inputs)["logits"]
    assert found[0] == pytest.approx(expected[0, [2, 5, 4]], abs=1e-4)
    assert found[1] == pytest.approx(expected[1, [0, 3, 2]], abs=1e-4)
    found = model.reference.run({**inputs, "back": np.array([4, -1])})["logits"]  # what is outside is clamped
    assert found[1] == pytest.approx(expected[1, [0, 4]], abs=1e-4)
    for back in (-99, 99, -(1 << 63)):
        assert np.isfinite(model.reference.run({**inputs, "back": np.array([back])})["logits"]).all()


def test_a_decoder_that_checks_drafts_looks_back():
    signature = load_model(llama(), decoder={"batch": 1, "speculative_tokens": 4}).signature
    assert [str(spec) for spec in signature.inputs][:4] == [
        "ids:1xtime:int64", "past:1:int64", "count:1:int64", "back:kept:int64",
    ]  # fmt: skip
    assert str(signature.outputs[0]) == "logits:1xkeptx43:float32"
    assert {name: str(axis) for name, axis in signature.axes.items()} == {"time": "1..1..32", "kept": "1..1..5"}
    assert signature.states["key.0"] == "key.0_out"
    assert signature.batch_axis is None
    check_decoder(signature)
    plain = load_model(llama(), decoder={"batch": 1}).signature
    assert [str(spec) for spec in plain.inputs][2:4] == ["count:1:int64", "key.0:1x2x32x4:float32"]


def test_the_signature_pairs_caches():
    model = load_model(llama(), decoder={"max_length": 24, "batch": 3})
    assert [str(spec) for spec in model.signature.inputs] == [
        "ids:batchxtime:int64", "past:batch:int64", "count:batch:int64",
        *(f"{kind}.{layer}:batchx2x24x4:float32" for kind in ("key", "value") for layer in range(2)),
    ]  # fmt: skip
    assert [str(spec) for spec in model.signature.outputs][:2] == [
        "logits:batchx43:float32",
        "key.0_out:batchx2x24x4:float32",
    ]
    assert str(model.signature.axes["batch"]) == "1..1..3"
    assert str(model.signature.axes["time"]) == "1..1..24"
    assert model.signature.states["value.1"] == "value.1_out"
    assert model.stop == (1,)


def test_one_row_alone_is_no_dynamic_axis():
    signature = load_model(llama(), decoder={"batch": 1}).signature
    assert {spec.shape[0] for spec in (*signature.inputs, *signature.outputs)} == {1}
    assert list(signature.axes) == ["time"]
    check_decoder(signature)


def test_weights_may_be_given_beside_a_factory(tmp_path):
    torch.manual_seed(1)
    trained = llama()
    save_file(trained.state_dict(), tmp_path / "trained.safetensors")
    model = load_model(llama(), weights=tmp_path / "trained.safetensors")
    with torch.no_grad():
        expected = trained.eval()(torch.tensor([[3, 1, 4]])).logits[:, -1].numpy()
    assert call(model, [3, 1, 4], 0)[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="older versions cache expanded keys")
def test_of_multi_head_latent_attention_the_latent_is_cached():
    model = load_model(deepseek())
    shapes = {spec.name: spec.shape for spec in model.signature.inputs}
    assert shapes["key.0"] == ("batch", 1, 32, 12)
    assert shapes["value.0"] == ("batch", 1, 32, 4)


def test_a_cache_is_as_long_as_the_model_allows():
    assert load_model(llama()).signature.axes["time"].max == 32
    assert load_model(llama(max_position_embeddings=4096)).signature.axes["time"].max == 1024
    with pytest.raises(RecipeError, match=r"(?s)max_length=33 is more than LlamaForCausalLM was made for.*at most 32"):
        load_model(llama(), decoder={"max_length": 33})


def test_nothing_is_read_or_written_outside_of_a_cache():
    model = load_model(gpt2(), decoder={"max_length": 8})
    caches = {s.name: np.zeros((1, *s.shape[1:]), np.float32) for s in model.signature.inputs[3:]}
    for past, count in ((99, 1), (-5, 1), (7, 99), (7, -1)):
        numbers = {"ids": np.array([[1, 2]]), "past": np.array([past]), "count": np.array([count])}
        assert np.isfinite(model.reference.run({**numbers, **caches})["logits"]).all()


def test_a_model_whose_inputs_are_declared_has_no_cache():
    model = load_model(llama(), inputs=parse_inputs(["input_ids:1x4:int64"]), arguments={"use_cache": False})
    assert [spec.name for spec in model.signature.inputs] == ["input_ids"]
    assert not model.signature.states


def test_a_sliding_window_that_is_longer_than_the_cache_is_none():
    load_model(mistral(sliding_window=16), decoder={"max_length": 16})
    with pytest.raises(
        SourceError, match=r"(?s)MistralAttention attends within a sliding window of 16 tokens.*max_length=16"
    ):
        load_model(mistral(sliding_window=16), decoder={"max_length": 17})


def test_attention_of_another_kind_is_refused():
    config = transformers.Gemma2Config(**DENSE, **HEADS, head_dim=4, sliding_window=32)
    with pytest.raises(
        SourceError, match=r"(?s)Gemma2Attention attends with 'softcap', which is not supported.*--input"
    ):
        load_model(transformers.Gemma2ForCausalLM(config), decoder={"max_length": 16})


def test_a_model_that_computes_something_else_with_a_cache_is_refused(monkeypatch):
    from enginesmith.compiler.sources.decoders import module

    monkeypatch.setattr(
        module.Rows, "_written", lambda rows, buffer, new: buffer.scatter(2, rows._index.expand(*new.shape), new * 1.1)
    )
    with pytest.raises(
        SourceError, match=r"(?s)LlamaForCausalLM computes something else with a static cache.*relative L2"
    ):
        load_model(llama())


def test_a_model_that_keeps_something_else_is_refused():
    config = transformers.MambaConfig(vocab_size=43, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(
        SourceError, match=r"MambaForCausalLM (does not run|computes|keeps|.*cannot be replaced)|attention of"
    ):
        load_model(transformers.MambaForCausalLM(config))


def test_only_causal_language_models_have_a_cache():
    assert is_causal(gpt2())
    assert not is_causal(gpt2(add_cross_attention=True))
    assert not is_causal(torch.nn.Linear(2, 2))
    assert not is_causal(transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=7)))


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_folder_is_loaded_with_its_tokenizer(folder):
    assert load_model(folder).tokenizer is None
    (folder / "tokenizer.json").write_text("{}")
    model = load_model(folder, decoder={"max_length": 16})
    assert model.tokenizer == folder / "tokenizer.json"
    assert model.signature.axes["time"].max == 16


def test_a_folder_in_half_precision_is_loaded_in_float32(folder):
    llama().half().save_pretrained(folder)
    assert {parameter.dtype for parameter in open_folder(folder).parameters()} == {torch.float32}


def test_weights_that_are_missing_are_an_error(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(SourceError, match=r"(?s)do not fit its config.json.*9 missing: model.layers.2"):
        load_model(folder)


def test_a_pickle_is_never_read(folder):
    (folder / "model.safetensors").unlink()
    torch.save(llama().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"(?s)cannot be loaded by transformers.*config.json and .safetensors"):
        load_model(folder)


def test_code_in_a_folder_is_never_run(folder):
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps({**config, **own}))
    (folder / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(SourceError, match=r"(?s)cannot be loaded by transformers") as caught:
        load_model(folder)
    assert "it ran" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arguments": {"a": 1}}, "takes no inputs, dynamic axes and arguments"),
        ({"dynamic": ["ids:0=1..2..4"]}, "takes no inputs, dynamic axes and arguments"),
        ({"decoder": {"max_length": 1}}, r"(?s)max_length of the decoder is too small.*found: 1"),
        ({"decoder": {"batch": 0}}, r"(?s)batch of the decoder is too small.*found: 0"),
        ({"decoder": {"speculative_tokens": -1}}, r"(?s)speculative_tokens of the decoder is too small.*found: -1"),
        ({"decoder": {"speculative_tokens": 32}}, r"(?s)as large as its cache.*fewer than max_length=32.*found: 32"),
        ({"decoder": {"speculative_tokens": 8, "max_length": 8}}, "fewer than max_length=8"),
        ({"decoder": {"cache_mib": 0}}, "cache_mib of the decoder is out of range"),
        ({"decoder": {"cache_mib": 0.0001}}, "(?s)cache_mib=0.0001 holds no two tokens.*or more"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, options, message):
    with pytest.raises(RecipeError, match=message):
        load_model(folder, **options)


def test_an_unknown_eviction_is_refused(folder):
    with pytest.raises(UnknownNameError, match=r"(?s)unknown eviction of the decoder 'windows'.*did you mean 'window'"):
        load_model(folder, decoder={"eviction": "windows"})


@pytest.mark.parametrize("make", [gpt2, llama, deepseek])
def test_attention_that_entries_got_is_added_up(make):
    original = make().eval()
    model = load_model(original, decoder={"max_length": 16, "batch": 2, "eviction": "importance"})
    assert model.signature.positions == 32
    tokens = np.random.default_rng(0).integers(0, 43, (2, 6))
    inputs = completed(model.signature, {"ids": tokens, "count": np.array([6, 4])})
    stale = {name: np.full_like(array, 9) for name, array in inputs.items() if name.startswith("importance.")}
    found = model.reference.run({**inputs, **stale})
    for row, count in enumerate((6, 4)):
        for layer in range(2):
            sums = found[f"importance.{layer}_out"][row, :, :, 0]
            heads = 4 // len(sums)
            assert sums.sum(axis=1) == pytest.approx(np.full(len(sums), count * heads), rel=1e-5)  # 1 of each query
            assert (sums[:, count:] == 0).all()
            assert (sums[:, :count].argmax(axis=1) == sums[:, :6].argmax(axis=1)).all()


def test_memory_bounds_the_cache():
    model = load_model(llama(), decoder={"cache_mib": 0.002, "batch": 1, "eviction": "window"})
    # 2 layers, keys and values, 2 heads of 4 numbers of 4 bytes: 128 bytes a token
    assert model.signature.input("key.0").shape == (1, 2, int(0.002 * 2**20 / 128), 4)


def test_a_folder_without_transformers_names_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(
        SourceError, match=r"(?s)a folder of transformers, which cannot be imported.*enginesmith\[text\]"
    ):
        load_model(folder)
