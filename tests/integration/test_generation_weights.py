"""A language model whose weights are stored in 8 and 4 bits: rounded on prompts alone, judged by its likelihoods."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

import enginesmith
from enginesmith.targets._onnxruntime_states import StatesRunner

pytestmark = pytest.mark.slow
LENGTH, VOCABULARY = 48, 512


def gpt2() -> transformers.PreTrainedModel:
    """Its embedding is the matrix of the output too, and its biases are added by Gemm."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=128, n_layer=1, n_head=4, initializer_range=0.1,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def texts() -> np.ndarray:
    """Drawn from the model itself, so that it finds them likely."""
    torch.manual_seed(0)
    first = torch.randint(VOCABULARY, (48, 4))
    found = gpt2().generate(
        first, attention_mask=torch.ones_like(first), max_new_tokens=20, do_sample=True, pad_token_id=0
    )
    return found.numpy()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, texts):
    root = tmp_path_factory.mktemp("weights")
    np.savez(root / "calibration.npz", ids=texts[:32])
    lengths = np.arange(16) % 16 + 8  # prompts of many lengths, padded
    following = texts[32:][np.arange(16), lengths]
    np.savez(root / "test.npz", ids=texts[32:], count=lengths, next=following)
    return enginesmith.compile(
        gpt2(),
        root / "bundle",
        decoder={"max_length": LENGTH, "batch": 4},
        data=str(root / "test.npz"),
        calibration_data=str(root / "calibration.npz"),
        metric="perplexity",
        budget="metric=0.05",
        tolerances={
            "int4-weights": {"relative_l2": 1, "max_abs": 1, "cosine": 0, "top1": 0}
        },  # the budget alone judges
        quantization={"rounding": "gptq", "block": 128},
        precisions=["fp32", "int8-weights", "int4-weights"],
        targets=["onnxruntime-cpu:threads=1"],
        passes=["simplify", "dedupe", "fuse-attention"],
        benchmark=False,
    )


def test_weights_are_rounded_on_prompts_alone(bundle):
    records = [record for record in bundle.manifest["passes"] if record["text"].startswith("quantize-weights")]
    assert [record["text"] for record in records] == [
        "quantize-weights:block=128,rounding=gptq",
        "quantize-weights:bits=4,block=128,rounding=gptq",
    ]
    for record in records:
        # Of attention what makes queries, keys and values; both of the feed-forward part; the head.
        assert record["changes"]["weights rounded by GPTQ"] == 4
        assert any("stays float: tables=true" in refusal["reason"] for refusal in record["refusals"])


def test_caches_stay_in_place_and_in_float32(bundle):
    for record in bundle.manifest["engines"][1:]:
        assert record["details"]["operators"]["MatMulNBits"] == 4
        assert record["details"]["operators"]["GroupQueryAttention"] == 1
        described = json.loads((bundle.path / "engines" / record["name"] / "engine.json").read_text())
        dtypes = {spec["name"]: spec["dtype"] for spec in described["signature"]["inputs"]}
        assert {dtypes[name] for name in described["signature"]["states"]} == {"float32"}
        with bundle.load(record["name"]) as engine:
            assert isinstance(engine._runner, StatesRunner)


def test_perplexity_is_held_against_the_budget(bundle, texts):
    perplexity = {}
    for record in bundle.manifest["engines"]:
        with bundle.load(record["name"]) as engine:
            perplexity[record["precision"]] = engine.perplexity(texts[32:])
            (alone,), together = engine.generate(texts[40, :8], 8), engine.generate(texts[40:43, :8], 8)
            assert together[0] == alone
    with torch.inference_mode():
        ids = torch.from_numpy(texts[32:])
        logits = gpt2()(ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    reference = float(loss.exp())
    assert perplexity["fp32"] == pytest.approx(reference, rel=1e-4)
    assert perplexity["int8-weights"] == pytest.approx(reference, rel=0.01)
    assert perplexity["int4-weights"] > 1.05 * reference  # random weights in blocks of 128
    _, int8, int4 = bundle.manifest["engines"]
    for record in (int8, int4):
        metric, budget = record["validation"]["metric"], record["validation"]["budget"]
        assert budget["value"] == pytest.approx(metric["reference"] - metric["value"])
        assert budget["holds"] is record["validation"]["passed"] is (record is int8)
    assert int4["validation"]["budget"]["value"] > 0.05
    assert bundle.manifest["verdict"]["reasons"] == ["onnxruntime-cpu-int4-weights failed its validation"]
