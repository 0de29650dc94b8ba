"""Speculative decoding with models of transformers: the tokens are those of greedy search without a draft."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import enginesmith

models = runpy.run_path(str(Path(__file__).with_name("test_generation.py")))
DRAFTED, PROMPT, COUNT = 4, [3, 1, 4, 1, 5, 9, 2, 6], 64
PASSES = {"llama": ["fuse-attention"], "gpt2": []}
BATCH = {"llama": 2, "gpt2": 1}


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Random models of one vocabulary, which check drafts, with what transformers finds."""
    opened = {}
    for name, passes in PASSES.items():
        model = models["random"](models[name])
        bundle = enginesmith.compile(
            model,
            tmp_path_factory.mktemp(name) / "bundle",
            decoder={"max_length": 96, "batch": BATCH[name], "speculative_tokens": DRAFTED},
            precisions=["fp32"],
            targets=["onnxruntime-cpu:threads=1"],
            passes=["simplify", "dedupe", *passes],
            benchmark=False,
        )
        assert bundle.passed, bundle.manifest["verdict"]["reasons"]
        assert bundle.manifest["engines"][0]["details"]["operators"].get("GroupQueryAttention", 0) == len(passes)
        opened[name] = bundle.load(), models["answers"](model, PROMPT, COUNT)
    yield opened
    for engine, _ in opened.values():
        engine.close()


@pytest.mark.parametrize("draft", PASSES)
@pytest.mark.parametrize("name", PASSES)
def test_tokens_are_those_of_transformers_whatever_the_draft(engines, name, draft):
    (engine, expected), (proposing, _) = engines[name], engines[draft]
    assert engine.generate(PROMPT, COUNT) == [expected]
    counts = enginesmith.Speculation()
    assert engine.generate(PROMPT, COUNT, draft=proposing, speculation=counts) == [expected]
    assert counts.tokens == COUNT - 1
    if name == draft:
        assert counts.accepted == counts.proposed
        assert counts.calls == -(-(COUNT - 1) // (DRAFTED + 1))
    else:
        assert counts.accepted < counts.proposed / 4


def test_an_end_stays_the_last_token(engines):
    engine, expected = engines["llama"]
    stop = expected[COUNT // 2]
    (found,) = engine.generate(PROMPT, COUNT, stop=[stop], draft=engine)
    assert found == expected[: expected.index(stop) + 1]


def test_the_whole_cache_may_be_filled(engines):
    engine, _ = engines["gpt2"]
    count = 96 - len(PROMPT)
    assert engine.generate(PROMPT, count, draft=engine) == engine.generate(PROMPT, count)


def test_rows_side_by_side_need_no_draft(engines):
    engine, _ = engines["llama"]
    prompts = [PROMPT, [7]]
    assert engine.generate(prompts, 24) == [engine.generate(prompt, 24)[0] for prompt in prompts]
