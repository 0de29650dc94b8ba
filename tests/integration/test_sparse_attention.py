"""A language model that is compiled a second time with attention to few keys, beside the engine that attends to all."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import transformers

import enginesmith

random = runpy.run_path(str(Path(__file__).parents[1] / "random_model.py"))["random"]

pytestmark = pytest.mark.slow
LENGTH, VOCABULARY, WINDOW, SINKS = 64, 61, 12, 2
DENSE, SPARSE = "onnxruntime-cpu-fp32", "onnxruntime-cpu-fp32-sparse-attention"


def gpt2() -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.npz"
    np.savez(path, ids=np.random.default_rng(0).integers(0, VOCABULARY, (16, LENGTH)))
    return str(path)


def compiled(folder, texts, budget):
    return enginesmith.compile(
        random(gpt2, 0.2),
        folder / "bundle",
        decoder={"max_length": LENGTH, "batch": 2},
        data=texts,
        calibration_data=texts,
        targets=["onnxruntime-cpu:threads=1"],
        precisions=["fp32"],
        passes=["simplify", "dedupe", "fuse-attention"],
        sparse_attention=f"window={WINDOW},sinks={SINKS},budget={budget},calls=4",
        tolerances={"int8": {"relative_l2": 10.0, "max_abs": 10.0, "cosine": 0.0, "top1": 0.0}},
        benchmark=False,
        max_samples=2,
    )


def test_short_texts_get_the_same_tokens_and_long_ones_other_logits(tmp_path, texts):
    bundle = compiled(tmp_path, texts, budget=100)
    (record,) = (record for record in bundle.manifest["engines"] if record["name"] == SPARSE)
    assert (record["status"], record["sibling"]) == ("ready", DENSE)
    (step,) = (step for step in bundle.manifest["passes"] if step["text"].startswith("sparse-attention"))
    assert (step["modified"], step["engines"]) == (True, [SPARSE])
    short = [3, 1, 4, 1, 5]
    long = np.random.default_rng(1).integers(0, VOCABULARY, (1, LENGTH - 1))
    with bundle.load(DENSE) as dense, bundle.load(SPARSE) as sparse:
        new = WINDOW - len(short)
        assert sparse.generate([short], new) == dense.generate([short], new)
        assert not np.isclose(sparse.perplexity(long), dense.perplexity(long), rtol=1e-3)


def test_layers_that_change_too_much_stay_dense_and_the_report_says_so(tmp_path, texts):
    bundle = compiled(tmp_path, texts, budget=0)
    (step,) = (step for step in bundle.manifest["passes"] if step["text"].startswith("sparse-attention"))
    assert not step["modified"]
    assert len(step["refusals"]) == 2
    assert all("ln p" in refusal["reason"] for refusal in step["refusals"])
    assert "ln p" in (bundle.path / "report.html").read_text()
    told = f"{SPARSE} is as {DENSE}, nothing was attended to sparsely"
    assert bundle.manifest["verdict"]["notes"][0].startswith(told)
