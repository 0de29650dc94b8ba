"""Generation on ONNX Runtime's CUDA provider: caches in place, tokens chosen on the device, the same as on the host."""

from __future__ import annotations

import runpy
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import enginesmith
from enginesmith.compiler.generation.choice import Choice
from enginesmith.compiler.generation.continuous import Request
from enginesmith.compiler.generation.sampling import Sampling
from enginesmith.compiler.generation.steps import steps_of
from enginesmith.errors import DataError, EngineError
from enginesmith.targets.cuda.arrays import DeviceArray
from enginesmith.targets.cuda.decoding import DecodingRunner, DeviceSteps, put

pytestmark = pytest.mark.gpu

random = runpy.run_path(str(Path(__file__).parents[1] / "random_model.py"))["random"]

LENGTH, BATCH, VOCABULARY = 128, 4, 611
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [2, 7, 1, 8, 2]]
SIZES = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
PASSES = ["simplify", "dedupe", "fuse-attention:scheme=onnxruntime-cuda", "fuse-transformer:scheme=onnxruntime-cuda"]


def gpt2() -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(**SIZES, n_positions=4 * LENGTH, n_embd=128, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def llama() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        **SIZES, max_position_embeddings=LENGTH, hidden_size=256, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


class Bundles:
    """Compiles each engine once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[tuple[str, str, str], tuple[transformers.PreTrainedModel, enginesmith.Bundle]] = {}

    def __call__(self, name: str, precision: str = "fp16", **decoder: int | str) -> tuple:
        key = (name, precision, str(decoder))
        if key not in self._made:
            model = random({"gpt2": gpt2, "llama": llama}[name], 0.1)  # fp16 is off by 0.6 % at most
            for parameter in (value for key, value in model.named_parameters() if key.endswith("bias")):
                torch.nn.init.normal_(parameter, std=0.1)
            bundle = enginesmith.compile(
                model,
                self._root / str(len(self._made)),
                decoder={"max_length": LENGTH, "batch": BATCH, **decoder},
                precisions=[precision],
                targets=["onnxruntime-cuda"],
                passes=PASSES if precision == "fp16" else PASSES[:2],
                tolerances={"fp16": {"relative_l2": 0.02, "max_abs": 0.1}},
                benchmark=False,
            )
            self._made[key] = (model, bundle)
        return self._made[key]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    return Bundles(tmp_path_factory.mktemp("bundles"))


def opened(bundle):
    """The one engine, whatever its validation says: a test of its own looks at that."""
    return bundle.load(bundle.manifest["engines"][0]["name"])


def greedy(model, prompt, count):
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_tokens_in_fp32_are_those_of_transformers(bundles, name):
    model, bundle = bundles(name, "fp32")
    with opened(bundle) as engine:
        assert engine.generate(PROMPTS, 100) == [greedy(model, prompt, 100) for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_call_is_one_cuda_graph_with_caches_in_half(bundles, name):
    _, bundle = bundles(name)
    (record,) = bundle.manifest["engines"]
    assert record["validation"]["passed"], [output["failures"] for output in record["validation"]["outputs"]]
    details = record["details"]
    assert details["in_place"]
    assert details["cuda_graph"] == {"used": True, "reason": ""}
    assert details["memcpy"] == 0
    assert details["operators"]["GroupQueryAttention"] == 2
    with opened(bundle) as engine:
        assert {engine.signature.input(cache).dtype for cache in engine.signature.states} == {"float16"}


DRAWN = {
    "greedy": {},
    "draw": {"do_sample": True, "temperature": 0.7, "seed": 3},
    "top-k": {"do_sample": True, "top_k": 5, "seed": 4},
    "top-p": {"do_sample": True, "top_k": 40, "top_p": 0.8, "temperature": 1.3, "seed": 5},
}


@pytest.mark.parametrize(
    ("name", "precision", "how"),
    [
        *(("gpt2", "fp32", how) for how in DRAWN),
        *(("llama", "fp16", how) for how in DRAWN if how != "top-p"),  # logits are equal now and then
    ],
)
def test_tokens_chosen_on_the_device_are_those_of_the_host(bundles, monkeypatch, name, precision, how):
    _, bundle = bundles(name, precision)
    with opened(bundle) as engine:
        found = engine.generate(PROMPTS, 60, **DRAWN[how])
        assert found == engine.generate(PROMPTS, 60, **DRAWN[how])  # on calls that were made before
        monkeypatch.setattr("enginesmith.compiler.generation.following.Choosing", type("Nothing", (), {}))
        assert found == engine.generate(PROMPTS, 60, **DRAWN[how])
    assert len({*found[0], *found[1], *found[2]}) > 3


def test_rows_are_what_they_are_alone(bundles):
    _, bundle = bundles("llama")
    with opened(bundle) as engine:
        rows = engine.generate(PROMPTS, 40)
        assert rows == [engine.generate(prompt, 40)[0] for prompt in PROMPTS]


def test_a_row_ends_at_its_stop_while_others_go_on(bundles):
    _, bundle = bundles("gpt2")
    with opened(bundle) as engine:
        rows = engine.generate(PROMPTS, 30)
        stop = rows[0][4]
        seen: list[tuple[int, int]] = []
        ended = engine.generate(PROMPTS, 30, stop=[stop], stream=lambda row, token: seen.append((row, token)))
    for row, whole in zip(ended, rows, strict=True):
        assert row == whole[: whole.index(stop) + 1 if stop in whole else None]
    assert [[token for at, token in seen if at == row] for row in range(3)] == ended


def test_a_prompt_is_read_on_in_pieces(bundles):
    _, bundle = bundles("llama")
    with opened(bundle) as engine:
        prompt = np.array([PROMPTS[0] * 3])
        whole = steps_of(engine._open_runner(), engine.signature, 1)
        expected = whole(prompt, np.zeros(1, np.int64), np.array([24])).copy()
        pieces = steps_of(engine._open_runner(), engine.signature, 1)
        pieces(prompt[:, :10], np.zeros(1, np.int64), np.array([10]))
        pieces(prompt[:, 10:11], np.array([10]), np.array([1]))
        found = pieces(prompt[:, 11:], np.array([11]), np.array([13]))
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_prefixes_and_the_batcher_give_the_same_tokens(bundles):
    _, bundle = bundles("gpt2")
    with opened(bundle) as engine:
        long = PROMPTS[0] * 4
        expected = [engine.generate(prompt, 20)[0] for prompt in (long, [*long[:-1], 5], *PROMPTS)]
        known = enginesmith.Prefixes(64 << 20)
        assert [engine.generate(prompt, 20, prefixes=known)[0] for prompt in (long, [*long[:-1], 5])] == expected[:2]
        assert known.reused == 31
        requests = [
            Request(np.array(prompt), 20, Choice(None), (), [].append, lambda error: done.release())
            for prompt in (long, [*long[:-1], 5], *PROMPTS)
        ]
        done = threading.Semaphore(0)
        batcher = engine.batcher(prefixes=known)
        for request in requests:
            batcher.submit(request)
        batcher.close()
        assert all(done.acquire(timeout=1) for _ in requests)
        found = [request.take.__self__ for request in requests]
    same = sum(a == b for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True))
    assert same > 80  # in fp16 other numbers of rows round otherwise


def test_requests_choose_each_in_its_own_way_on_the_device(bundles, monkeypatch):
    _, bundle = bundles("gpt2", "fp32")
    asked = list(zip(PROMPTS, ("greedy", "top-k", "top-p"), strict=True))
    with opened(bundle) as engine:
        expected = [engine.generate(prompt, 40, **DRAWN[how])[0] for prompt, how in asked]
        counts: list[int] = []
        token = DeviceSteps.token
        monkeypatch.setattr(
            DeviceSteps, "token", lambda self, last, *others: counts.append(len(last)) or token(self, last, *others)
        )
        requests = []
        for prompt, how in asked:
            given = {name: value for name, value in DRAWN[how].items() if name not in ("do_sample", "seed")}
            choice = Choice(Sampling(**given) if DRAWN[how] else None, (DRAWN[how].get("seed", 0), 0))
            requests.append(Request(np.array(prompt), 40, choice, (), [].append, lambda error: None))
        batcher = engine.batcher()
        for request in requests:
            batcher.submit(request)
        batcher.close()
    assert [request.take.__self__ for request in requests] == expected
    assert max(counts) == 3


@pytest.mark.parametrize("policy", ["window", "importance"])
def test_texts_longer_than_the_cache(bundles, policy):
    model, bundle = bundles("gpt2", "fp32", max_length=32, eviction=policy)
    with opened(bundle) as engine:
        kept = enginesmith.Eviction(policy)
        rows = engine.generate(PROMPTS, 60, eviction=kept)
        assert [len(row) for row in rows] == [60, 60, 60]
        assert rows[1][:24] == greedy(model, PROMPTS[1], 24)
        assert rows[2] == engine.generate(PROMPTS[2], 60, eviction=kept)[0]
        assert engine.generate(PROMPTS, 20) == [greedy(model, prompt, 20) for prompt in PROMPTS]  # chosen on the device


def test_drafts_change_nothing_and_are_found_on_the_device(bundles, monkeypatch):
    _, checking = bundles("gpt2", "fp32", speculative_tokens=4)
    _, small = bundles("gpt2")
    to_host: list[int] = []
    step = DeviceSteps.__call__
    with opened(checking) as engine, opened(small) as draft:
        expected = engine.generate(PROMPTS[0], 50)
        monkeypatch.setattr(
            DeviceSteps, "__call__", lambda self, ids, *more: to_host.append(ids.shape[1]) or step(self, ids, *more)
        )
        counts = enginesmith.Speculation()
        assert engine.generate(PROMPTS[0], 50, draft=draft, speculation=counts) == expected
    assert counts.accepted > 10
    assert to_host == [len(PROMPTS[0])]


def test_perplexity_is_that_of_fp32(bundles):
    _, exact = bundles("gpt2", "fp32")
    _, half = bundles("gpt2")
    texts = np.random.default_rng(0).integers(0, VOCABULARY, (3, 40))
    with opened(exact) as one, opened(half) as other:
        assert other.perplexity(texts) == pytest.approx(one.perplexity(texts), rel=1e-2)


def test_caches_are_given_and_come_back_as_floats(bundles):
    _, bundle = bundles("llama")
    with opened(bundle) as engine:
        runner, states = engine._open_runner(), engine.signature.states
        inputs = {"ids": np.array([PROMPTS[0]]), "past": np.zeros(1, np.int64), "count": np.array([8])}
        halves = {
            name: np.zeros([1, *engine.signature.input(name).shape[1:]], np.float16) for name in engine.signature.states
        }
        floats = {name: array.astype(np.float32) for name, array in halves.items()}
        stored, real = engine.run({**inputs, **halves}), runner.run({**inputs, **floats})
        for output in states.values():
            assert stored[output].dtype == np.float16
            assert real[output].dtype == np.float32
            assert np.array_equal(real[output], stored[output].astype(np.float32))
            assert np.abs(real[output][:, :, :8]).max() > 0
        bound = runner.bind({**inputs, **floats})
        for _ in range(2):
            bound.run()
        outputs = bound.outputs()
        assert all(np.array_equal(outputs[name], real[name]) for name in real)


def test_several_rows_with_several_tokens_behind_others_are_refused(bundles):
    _, bundle = bundles("llama")
    with opened(bundle) as engine:
        steps = steps_of(engine._open_runner(), engine.signature, 2)
        with pytest.raises(DataError, match="several rows as prompts, or with one token each"):
            steps(np.zeros((2, 3), np.int64), np.ones(2, np.int64), np.ones(2, np.int64))


def test_logits_that_are_no_numbers_are_told(bundles, monkeypatch):
    _, bundle = bundles("gpt2")
    with opened(bundle) as engine:
        assert isinstance(engine._open_runner(), DecodingRunner)
        steps = steps_of(engine._open_runner(), engine.signature, 2)
        ids, past = np.zeros((2, 3), np.int64), np.zeros(2, np.int64)
        steps(ids, past, np.array([3, 3]))
        logits = np.zeros((2, VOCABULARY), np.float32)
        logits[1, 7] = np.nan
        calls = steps._calls
        engine._open_runner().turn(lambda: put(engine._open_runner().stream, calls.logits, logits))
        _, best = next(steps.tokens(np.array([3, 3]), 5))
        assert np.isfinite(best[0])
        assert not np.isfinite(best[1])


def test_caches_on_the_device_are_cut_and_copied_like_arrays(bundles):
    _, bundle = bundles("gpt2")
    with opened(bundle) as engine:
        cache = next(iter(engine._open_runner().empty_caches(3).values()))
        array = np.asarray(cache).copy()
        assert isinstance(cache, DeviceArray)
        assert not array.any()
        numbers = np.random.default_rng(0).standard_normal((2, 5, 64)).astype(np.float16)
        for made in (cache, array):
            made[1, :, :5] = numbers
            made[0, :, :3] = made[1, :, :3]
            made[1:3][1:][:, :, :4] = made[:1][:, :, :4]
        assert np.array_equal(np.asarray(cache), array)
        assert np.array_equal(np.asarray(cache[:2, :, :6].copy()), array[:2, :, :6])
        with pytest.raises(ValueError, match="does not go into"):
            cache[0, :, :3] = cache[1, :, :4]
        with pytest.raises(IndexError, match="rows and first tokens"):
            cache[0, 1]


def test_a_closed_engine_says_so(bundles):
    _, bundle = bundles("gpt2")
    engine = opened(bundle)
    steps = steps_of(engine._open_runner(), engine.signature, 1)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        steps(np.zeros((1, 1), np.int64), np.zeros(1, np.int64), np.ones(1, np.int64))
