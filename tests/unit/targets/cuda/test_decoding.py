"""Generation on a device without a GPU: its memory is that of the host, its sessions are those of the CPU."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import runpy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from enginesmith.compiler.engine import Engine
from enginesmith.compiler.generation.choice import Choice
from enginesmith.compiler.generation.continuous import Request
from enginesmith.compiler.generation.prefixes import Prefixes
from enginesmith.compiler.generation.sampling import Sampling
from enginesmith.compiler.generation.speculative import Proposer, Speculation
from enginesmith.compiler.generation.steps import Choosing, Finding, Stepping, likeliest, steps_of
from enginesmith.compiler.graph import Graph
from enginesmith.compiler.signature import TensorSpec
from enginesmith.compiler.states import longest_draft
from enginesmith.errors import DataError, EngineError
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context
from enginesmith.targets._caches import Caches
from enginesmith.targets._onnxruntime import Session
from enginesmith.targets._onnxruntime_states import saved
from enginesmith.targets.base import BuildRequest, EngineInfo
from enginesmith.targets.cuda import arrays, choosers, decoding
from enginesmith.targets.cuda import onnxruntime as device
from enginesmith.targets.cuda.decoding import DecodingRunner, put

small = runpy.run_path(str(Path(__file__).parents[3] / "small_decoder.py"))
FakeStream = runpy.run_path(str(Path(__file__).parents[3] / "host_device.py"))["Stream"]
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5]]


def fake_call(function, *arguments):
    """The calls of the driver that caches make."""
    if function == "cuMemsetD8Async":
        address, value, size, _ = arguments
        ctypes.memset(address.value, value.value, size.value)
        return
    assert function == "cuMemcpy2DAsync_v2"
    copy = arguments[0]._obj
    source, target = ((p.host if p.kind == arrays.HOST else p.device, p.pitch) for p in (copy.source, copy.target))
    for line in range(copy.height):
        ctypes.memmove(target[0] + line * target[1], source[0] + line * source[1], copy.width)


@pytest.fixture(scope="module")
def on_host():
    with pytest.MonkeyPatch.context() as patch:
        for module in (device, decoding):
            patch.setattr(module, "DEVICE", "cpu")
        patch.setattr(arrays, "call", fake_call)
        patch.setattr(decoding, "pinned", lambda shape, dtype, stream: np.zeros(shape, dtype))
        yield


EVICTING = (
    small["GRAPH"]
    .replace("int64[batch] count,", "int64[batch] count, int64[batch] position,")
    .replace("Gather(place, positions)", "Gather(place, spots)")
    .replace("token = Gather", "begin = Unsqueeze(position, axis1)  spots = Add(begin, steps)  token = Gather")
)
"""The decoder with the input `position`, at which embeddings are looked up."""


def signature_of(kind):
    """What a kind of decoder takes and gives."""
    made = small["signature"](2 if kind == "checking drafts" else 0)
    if kind != "dropping tokens":
        return made
    inputs = (*made.inputs[:3], TensorSpec("position", "int64", ("batch",)), *made.inputs[3:])
    return dataclasses.replace(made, inputs=inputs, positions=small["ROOM"])


@pytest.fixture(
    scope="module",
    params=[("fp32", ""), ("fp16", ""), ("fp32", "checking drafts"), ("fp32", "dropping tokens")],
    ids=lambda param: " ".join(filter(None, param)),
)
def engine(request, on_host, tmp_path_factory):
    precision, kind = request.param
    folder = tmp_path_factory.mktemp("engine")
    text = {"checking drafts": small["LOOKING_BACK"], "dropping tokens": EVICTING}.get(kind, small["GRAPH"])
    graph = Graph.from_proto(small["model"](text))
    graph.infer()
    signature = signature_of(kind)
    for text in ("fuse-attention:scheme=onnxruntime-cuda", *(["cast:to=fp16"] if precision == "fp16" else [])):
        assert parse_pass(text)(graph, Context(signature)).modified
    made = saved(
        BuildRequest(
            directory=folder, signature=signature, precision=precision, sample={}, cache=folder / "cache",
            log=print, graph=graph, model=None,
        ),
        folder / "model.onnx",
    )  # fmt: skip
    choosers.write(folder, made.signature)
    runner = DecodingRunner(
        Session().open(folder / "model.onnx"), FakeStream(), made.signature, Caches.read(folder, made.signature),
        lambda name: Session().open(folder / name), fused=True, graphs=True,
    )  # fmt: skip
    info = EngineInfo("engine", "onnxruntime-cuda", precision, "model.onnx", made.signature)
    with Engine(info, runner) as opened:
        yield opened


def test_it_is_one_for_generation(engine):
    runner = engine._open_runner()
    assert isinstance(runner, Stepping)
    assert isinstance(steps_of(runner, engine.signature, 1), Choosing)


def test_tokens_are_those_without_a_cache(engine):
    expected = [small["greedy"](prompt, 8) for prompt in PROMPTS]
    assert engine.generate(PROMPTS, 8) == expected
    assert engine.generate(PROMPTS, 8) == expected  # on calls that were made before
    assert [engine.generate(prompt, 8)[0] for prompt in PROMPTS] == expected


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.5, "temperature": 60.0}], ids=str
)
def test_what_is_drawn_is_what_the_host_draws(engine, monkeypatch, options):
    given = {"do_sample": True, "temperature": 30.0, "seed": 5, **options}
    found = engine.generate(PROMPTS, 8, **given)
    assert found != engine.generate(PROMPTS, 8)
    monkeypatch.setattr("enginesmith.compiler.generation.following.Choosing", type("Nothing", (), {}))
    assert engine.generate(PROMPTS, 8, **given) == found


def test_a_row_ends_at_its_stop_token_and_the_others_go_on(engine):
    rows = engine.generate(PROMPTS, 8)
    stop = rows[0][1]
    assert engine.generate(PROMPTS, 8, stop=stop) == [
        row[: row.index(stop) + 1] if stop in row else row for row in rows
    ]


def test_generations_share_caches_unless_they_run_at_a_time(engine):
    runner = engine._open_runner()
    engine.generate(PROMPTS, 2)
    rows = runner._rows
    first = steps_of(runner, engine.signature, 2)
    kept = first._calls
    assert kept._caches["key"].address == runner._shared["key"].address
    assert all(not np.asarray(cache).any() for cache in kept._caches.values())
    other = steps_of(runner, engine.signature, 2)
    assert other._calls is not kept
    assert other._calls._caches["key"].address != kept._caches["key"].address
    del other
    assert steps_of(runner, engine.signature, 2)._calls is not kept
    del first
    assert steps_of(runner, engine.signature, 2)._calls is kept
    assert runner._rows == rows


def test_prompts_are_read_in_pieces_and_behind_each_other(engine):
    steps = steps_of(engine._open_runner(), engine.signature, 1)
    text = [3, 1, 4, 1, 5, 9]
    for start, stop in ((0, 2), (2, 3), (3, 6)):
        logits = steps(np.array([text[start:stop]]), np.array([start]), np.array([stop - start]))
        expected = small["logits_after"](text[:stop])
        assert np.abs(logits[0] - expected).max() < 0.01 * np.abs(expected).max()


def test_the_likeliest_tokens_are_those_of_the_logits(engine):
    runner, signature = engine._open_runner(), engine.signature
    text, one = np.array([[3, 1, 4, 1, 5]]), np.ones(1, np.int64)
    for back in (None, np.array([2, 1, 0])) if longest_draft(signature) else (None,):
        logits = steps_of(runner, signature, 1)(text, 0 * one, 5 * one, back)
        steps = steps_of(runner, signature, 1)
        assert isinstance(steps, Finding)
        for _ in range(2):  # the second time on what is there
            tokens, best = likeliest(steps, text, 0 * one, 5 * one, back)
            assert tokens.tolist() == logits.argmax(axis=-1).tolist()
            assert best.tolist() == logits.max(axis=-1).tolist()
        again, _ = likeliest(steps, np.array([[9]]), 5 * one, one)
        assert again.tolist() == [small["logits_after"]([3, 1, 4, 1, 5, 9]).argmax()]
        del steps


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_drafts_are_proposed_and_checked_on_the_device(engine, monkeypatch, tmp_path, wrong):
    if not longest_draft(engine.signature):
        pytest.skip("the engine checks no drafts")
    expected = [small["greedy"](prompt, 9) for prompt in PROMPTS]
    lengths = []
    step = decoding.DeviceSteps.__call__
    monkeypatch.setattr(
        decoding.DeviceSteps,
        "__call__",
        lambda self, ids, *others: lengths.append(len(ids[0])) or step(self, ids, *others),
    )
    if wrong:
        monkeypatch.setattr(
            decoding.DeviceSteps, "tokens", lambda self, past, limit: iter([(np.array([7]), np.ones(1))] * limit)
        )
    counts = Speculation()
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert engine.generate(prompt, 9, draft=engine, speculation=counts) == [tokens]
    assert counts.tokens == 24
    assert (counts.accepted == counts.proposed) != wrong
    batcher = engine.batcher(draft=engine)
    request = Request(np.array(PROMPTS[0]), 9, Choice(None), (), [].append, lambda error: None)
    batcher.submit(request)
    batcher.close()
    assert request.take.__self__ == expected[0]
    assert lengths == [len(prompt) for prompt in [*PROMPTS, PROMPTS[0]]]  # no logits but those behind prompts


def test_several_rows_with_several_tokens_behind_others_are_refused(engine):
    steps = steps_of(engine._open_runner(), engine.signature, 2)
    with pytest.raises(DataError, match=r"several rows as prompts, or with one token each\n.*\n.*2 rows of 3 tokens"):
        steps(np.zeros((2, 3), np.int64), np.ones(2, np.int64), np.ones(2, np.int64))


def test_the_batcher_moves_rows_on_the_device(engine):
    known = Prefixes(1 << 20)
    long = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    asked = [(PROMPTS[0], 8), (PROMPTS[1], 3), (PROMPTS[2], 6), (long, 5), ([*long, 3], 4)]
    batcher = engine.batcher(prefixes=known)
    assert isinstance(batcher._caches["key"], arrays.DeviceArray)
    requests = [
        Request(np.array(prompt), count, Choice(None), (), [].append, lambda error: None) for prompt, count in asked
    ]
    for request in requests:
        batcher.submit(request)
    batcher.close()
    for (prompt, count), request in zip(asked, requests, strict=True):
        assert request.take.__self__ == small["greedy"](prompt, count)
    assert known.reused == 9


FEW, ANY, LIKELY = Sampling(20.0, 4), Sampling(30.0), Sampling(40.0, top_p=0.7)


@pytest.mark.parametrize(
    "mixed", [[None] * 3, [FEW] * 3, [ANY, Sampling(25.0), ANY], [None, FEW, LIKELY], [ANY, None, None]], ids=str
)
def test_each_request_chooses_in_its_own_way_on_the_device(engine, monkeypatch, mixed):
    options = [{"do_sample": True, **dataclasses.asdict(sampling)} if sampling else {} for sampling in mixed]
    alone = [engine.generate(prompt, 6, seed=7, **given)[0] for prompt, given in zip(PROMPTS, options, strict=True)]
    counts = []
    token = decoding.DeviceSteps.token
    monkeypatch.setattr(
        decoding.DeviceSteps,
        "token",
        lambda self, last, *others: counts.append(len(last)) or token(self, last, *others),
    )
    batcher = engine.batcher()
    requests = [
        Request(np.array(prompt), 6, Choice(sampling, (7, 0)), (), [].append, lambda error: None)
        for prompt, sampling in zip(PROMPTS, mixed, strict=True)
    ]
    for request in requests:
        batcher.submit(request)
    batcher.close()
    assert [request.take.__self__ for request in requests] == alone
    assert max(counts) == 3


def test_the_batcher_tells_of_logits_that_are_no_numbers(engine, monkeypatch):
    def broken(self, last, *_):
        return np.zeros(len(last), np.int64), np.where(np.arange(len(last)) == 1, np.inf, 1.0).astype(np.float32)

    monkeypatch.setattr(decoding.DeviceSteps, "token", broken)
    errors = {}
    batcher = engine.batcher()
    for row, prompt in enumerate(PROMPTS):
        end = functools.partial(errors.__setitem__, row)
        batcher.submit(Request(np.array(prompt), 9, Choice(None, row=row), (), [].append, end))
    batcher.close()
    assert errors[0] is None
    assert "gives logits that are no numbers, for row 1 at token 2" in str(errors[1])


def test_a_draft_proposes_where_its_logits_lie(engine, monkeypatch):
    propose = Proposer(engine._open_runner(), engine.signature)
    expected = small["greedy"](PROMPTS[0], 6)
    assert propose(PROMPTS[0], 4) == expected[:4]
    propose.keep(len(PROMPTS[0]) + 1)
    assert propose([*PROMPTS[0], *expected[:2]], 4) == expected[2:]
    full = [*PROMPTS[0], *expected, *range(small["ROOM"])][: small["ROOM"]]
    assert len(propose(full, 4)) == 1
    assert propose([*full, 1], 4) == []
    broken = iter([(np.zeros(1, np.int64), np.array([np.inf]))])
    monkeypatch.setattr(decoding.DeviceSteps, "tokens", lambda *_: broken)
    with pytest.raises(EngineError, match="logits that are no numbers, for token 1 of a draft"):
        Proposer(engine._open_runner(), engine.signature)(PROMPTS[0], 1)


def test_float_caches_are_stored_and_come_back_as_floats(engine):
    generator = np.random.default_rng(1)
    shape = (2, small["HEADS"], small["ROOM"], small["WIDTH"])
    filled = (np.arange(small["ROOM"]) < 4)[:, None]
    names = {spec.name for spec in engine.signature.inputs}
    given = {
        "ids": generator.integers(0, small["VOCABULARY"], (2, 1)), "past": np.full(2, 4), "count": np.ones(2, np.int64),
        **{
            name: np.where(filled, generator.standard_normal(shape), 0).astype(np.float32) for name in ("key", "value")
        },
        **({"back": np.zeros(1, np.int64)} if "back" in names else {}),
        **({"position": np.full(2, 4)} if "position" in names else {}),
    }  # fmt: skip
    runner = engine._open_runner()
    outputs, bound = runner.run(given), runner.bind(given)
    for _ in range(2):
        bound.run()
    again = bound.outputs()
    for name in ("key", "value"):
        assert outputs[f"{name}_out"].dtype == np.float32
        assert np.abs(outputs[f"{name}_out"][:, :, :4] - given[name][:, :, :4]).max() < 2e-3
        assert np.array_equal(again[f"{name}_out"], outputs[f"{name}_out"])


def test_logits_that_are_no_numbers_are_told(engine):
    steps = steps_of(engine._open_runner(), engine.signature, 2)
    steps(np.zeros((2, 1), np.int64), np.zeros(2, np.int64), np.ones(2, np.int64))
    logits = np.zeros((2, small["VOCABULARY"]), np.float32)
    logits[1, 3] = np.nan
    put(FakeStream(), steps._calls.logits, logits)
    _, best = next(steps.tokens(np.ones(2, np.int64), 4))
    assert np.isfinite(best).tolist() == [True, False]


def test_an_engine_that_gives_no_numbers_is_refused_with_the_row(engine, monkeypatch):
    def broken(self, past, limit, sampling=None, draws=None):
        yield np.zeros(2, np.int64), np.array([1.0, np.inf], np.float32)

    monkeypatch.setattr(decoding.DeviceSteps, "tokens", broken)
    with pytest.raises(EngineError, match="gives logits that are no numbers, for row 1 at token 1"):
        engine.generate(PROMPTS[:2], 3)


def test_caches_are_cut_and_copied_like_arrays(engine):
    cache = engine._open_runner().empty_caches(3)["key"]
    array = np.asarray(cache).copy()
    heads, room, width = cache.shape[1:]
    assert cache.nbytes == array.nbytes
    numbers = np.random.default_rng(0).standard_normal((heads, 5, width)).astype(array.dtype)
    for made in (cache, array):
        made[1, :, :5] = numbers
        made[0, :, :3] = made[1, :, :3]
        made[1:3][1:][:, :, :4] = made[:1][:, :, :4]
    assert np.array_equal(np.asarray(cache), array)
    assert np.array_equal(np.asarray(cache[:2, :, :6].copy()), array[:2, :, :6])
    assert np.asarray(cache[2], dtype=np.float64).shape == (heads, room, width)
    cache[:, :, :0] = array[:, :, :0]
    with pytest.raises(ValueError, match="does not go into"):
        cache[0, :, :3] = cache[1, :, :4]
    for key in ((0, 1), (0, slice(None), slice(2, 3)), (slice(None), slice(1, 2))):
        with pytest.raises(IndexError, match="rows and first tokens"):
            cache[key]


def test_graphs_of_cuda_are_counted(engine, monkeypatch):
    runner = engine._open_runner()
    monkeypatch.setattr(runner, "_captured", decoding.GRAPHS - 1)
    assert runner.graph() > 0
    assert runner.graph() == device.NO_GRAPH


def test_a_closed_engine_says_so(on_host, tmp_path):
    onnx.save(small["model"](), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    runner = DecodingRunner(
        session, FakeStream(), small["signature"](), Caches(), lambda name: None, fused=False, graphs=False
    )
    steps = steps_of(runner, small["signature"](), 1)
    runner.close()
    with pytest.raises(EngineError, match=r"the engine is closed\n.*load it again"):
        steps(np.zeros((1, 1), np.int64), np.zeros(1, np.int64), np.ones(1, np.int64))
