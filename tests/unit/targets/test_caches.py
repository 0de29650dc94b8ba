"""An engine that keeps its caches in 8 bits: how it is fed, and that it generates like any other."""

import dataclasses
import queue
import runpy
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import enginesmith
from enginesmith.compiler.calibration import Calibration
from enginesmith.compiler.engine import Engine
from enginesmith.compiler.generation.choice import Choice
from enginesmith.compiler.generation.continuous import Request
from enginesmith.compiler.graph import Graph
from enginesmith.compiler.graph.probe import run
from enginesmith.compiler.quantization.cache_ends import stored
from enginesmith.compiler.signature import Signature
from enginesmith.compiler.states import as_floats, completed, empty_caches, in_eight_bits, in_sixteen_bits, row_bytes
from enginesmith.errors import DataError
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context
from enginesmith.targets import parse_target
from enginesmith.targets._caches import FILE, Caches
from enginesmith.targets._onnxruntime_states import StatesRunner
from enginesmith.targets.base import BuildRequest, EngineInfo

small = runpy.run_path(str(Path(__file__).parents[2] / "small_decoder.py"))
SIGNATURE = small["signature"]()
STATES = SIGNATURE.states
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]


class Prompts:
    description, random = "prompts", False

    def __iter__(self):
        generator = np.random.default_rng(0)
        for _ in range(8):
            yield completed(SIGNATURE, {"ids": generator.integers(0, small["VOCABULARY"], (2, small["ROOM"]))})


def graph(*texts):
    made = Graph.from_proto(small["model"]())
    made.infer()
    for text in texts:
        parse_pass(text)(made, Context(SIGNATURE, calibration=Calibration(Prompts())))
    return made


def built(folder, made, *, target="onnxruntime-cpu:threads=1", signature=SIGNATURE):
    """What the target makes of a graph, as it lies in a bundle; and its log."""
    directory, log = folder / "engine", []
    directory.mkdir(parents=True)
    request = BuildRequest(
        graph=made, model=None, signature=signature, precision="fp32", sample=next(iter(Prompts())),
        directory=directory, cache=folder / "cache", log=log.append,
    )  # fmt: skip
    parse_target(target).build(request).write(directory)
    return directory, EngineInfo.read(directory), log


@pytest.fixture(scope="module", params=[("fuse-attention",), ()], ids=["fused", "as captured"])
def engine(request, tmp_path_factory):
    made = graph(*request.param, "kv-cache:limit=0.5")
    directory, info, _ = built(tmp_path_factory.mktemp("engine"), made)
    with Engine(info, parse_target("onnxruntime-cpu:threads=1").runner(directory, info)) as engine:
        engine.graph = made
        yield engine


def call(past=4, length=1, rows=2):
    generator = np.random.default_rng(1)
    shape = (rows, small["HEADS"], small["ROOM"], small["WIDTH"])
    filled = (np.arange(small["ROOM"]) < past)[:, None]
    return {
        "ids": generator.integers(0, small["VOCABULARY"], (rows, length)),
        "past": np.full(rows, past),
        "count": np.full(rows, length),
        **{name: np.where(filled, 3 * generator.standard_normal(shape), 0).astype(np.float32) for name in STATES},
    }


def test_the_signature_says_that_caches_are_kept_in_8_bits(engine):
    assert {spec.name: spec.dtype for spec in (*engine.signature.inputs, *engine.signature.outputs)} == {
        "ids": "int64", "past": "int64", "count": "int64", "key": "int8", "value": "int8",
        "logits": "float32", "key_out": "int8", "value_out": "int8",
    }  # fmt: skip
    assert in_eight_bits(engine.signature) == ["key", "value"]
    assert as_floats(engine.signature) == SIGNATURE
    details = engine.info.details
    assert details["in_place"] is True
    assert details["caches_in_8_bits"] == 2
    assert 4 * details["cache_row_bytes"] == row_bytes(SIGNATURE) == 2 * 4 * small["WIDE"] * small["ROOM"]


@pytest.mark.parametrize(("past", "length"), [(0, 5), (7, 1)])
def test_float_caches_are_stored_and_come_back_as_floats(engine, past, length):
    given = call(past, length)
    before = {name: array.copy() for name, array in given.items()}
    expected = run(engine.graph, given)  # the graph before its ends were cut
    runner = engine._runner
    assert isinstance(runner, StatesRunner)
    bound = runner.bind(given)
    for _ in range(2):
        bound.run()
    for found in (runner.run(given), bound.outputs()):
        assert {name: array.dtype for name, array in found.items()} == dict.fromkeys(expected, np.float32)
        for name, array in expected.items():
            assert found[name] == pytest.approx(array, rel=1e-4, abs=1e-4)
    assert all(np.array_equal(given[name], array) for name, array in before.items())


def test_stored_caches_come_back_as_they_are_stored(engine):
    given = {**call(0, 3), **empty_caches(engine.signature, 2)}
    outputs = engine.run(given)
    again = engine.run({**call(3, 1), **{name: outputs[output] for name, output in STATES.items()}})
    assert {outputs[output].dtype for output in STATES.values()} == {np.dtype(np.int8)}
    assert outputs["key_out"][:, :, :3].any()
    assert not outputs["key_out"][:, :, 3:].any()
    assert np.array_equal(again["key_out"][:, :, :3], outputs["key_out"][:, :, :3])
    with pytest.raises(DataError, match="input 'key' has the wrong dtype"):
        engine.run(call())


def test_tokens_do_not_depend_on_other_rows(engine):
    together = engine.generate(PROMPTS, 8)
    assert together == [engine.generate(prompt, 8)[0] for prompt in PROMPTS]
    assert sum(found == small["greedy"](prompt, 8) for found, prompt in zip(together, PROMPTS, strict=True)) >= 2


def test_a_batcher_and_prefixes_give_the_same_tokens(engine):
    alone = [engine.generate(prompt, 8)[0] for prompt in PROMPTS]
    known = enginesmith.Prefixes(1 << 20)
    batcher, done = engine.batcher(prefixes=known), queue.SimpleQueue()
    found = [[] for _ in PROMPTS]
    for tokens, prompt in zip(found, PROMPTS, strict=True):
        batcher.submit(Request(np.array(prompt), 8, Choice(None), (), tokens.append, done.put))
    batcher.close()
    assert [done.get_nowait() for _ in PROMPTS] == [None] * len(PROMPTS)
    assert found == alone
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    expected = engine.generate([*text, 3], 4)
    engine.generate([*text, 0], 1, prefixes=known)
    assert engine.generate([*text, 3], 4, prefixes=known) == expected
    assert known.reused == len(text)
    assert {array.dtype for _, arrays in known._kept.values() for array in arrays.values()} == {np.dtype(np.int8)}


def test_texts_are_about_as_likely_as_with_float_caches(engine, tmp_path):
    texts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8]]
    directory, info, _ = built(tmp_path, graph("fuse-attention"))
    with Engine(info, parse_target("onnxruntime-cpu:threads=1").runner(directory, info)) as plain:
        exact = np.concatenate(plain.log_likelihoods(texts))
    assert not (directory / FILE).exists()
    found = np.concatenate(engine.log_likelihoods(texts))
    assert np.median(np.abs(found - exact)) < 0.05 * np.abs(exact).mean()
    assert not np.array_equal(found, exact)


@pytest.mark.parametrize("text", ["cast:to=fp16", "quantize-dynamic", "quantize-static"])
@pytest.mark.parametrize("fused", [True, False])
def test_what_lowers_the_rest_leaves_the_caches_in_8_bits(tmp_path, text, fused):
    made = graph(*(["fuse-attention"] if fused else []), "kv-cache:limit=0.5", text)
    _, info, _ = built(tmp_path, made)
    assert in_eight_bits(info.signature) == ["key", "value"]
    assert info.details["in_place"] is True


def test_keys_alone_are_not_stored():
    made = graph("fuse-attention")
    made.model.graph.outputs.pop()  # the values are no output, and so no cache
    signature = Signature(
        SIGNATURE.inputs[:4], SIGNATURE.outputs[:2], SIGNATURE.axes, {"dict": {}}, {"key": STATES["key"]}
    )
    assert in_eight_bits(signature) == []
    context = Context(signature, calibration=Calibration(Prompts()))
    result = parse_pass("kv-cache:limit=0.5")(made, context)
    assert [refusal.reason for refusal in result.refusals] == [
        "a cache stays as it is: keys and values of its attention are not both caches of the model"
    ]


def test_an_optimized_engine_and_a_profile_are_fed_alike(tmp_path):
    made = graph("fuse-attention", "kv-cache:limit=0.5")
    target = "onnxruntime-cpu:threads=1,optimized_model=true"
    directory, info, _ = built(tmp_path, made, target=target)
    assert info.entry == "optimized.onnx"
    runner = parse_target(target).runner(directory, info)
    given = call()
    for name, array in run(made, given).items():
        assert runner.run(given)[name] == pytest.approx(array, rel=1e-4, abs=1e-4)
    runner.close()
    profile = parse_target(target).profile(directory, info, given)
    assert any("GroupQueryAttention" in str(layer) for layer in profile.layers)


@pytest.mark.parametrize("fused", [True, False])
def test_a_graph_in_float16_keeps_its_caches_so(tmp_path, fused):
    made = graph(*(["fuse-attention"] if fused else []), "cast:to=fp16")
    directory, info, _ = built(tmp_path, made)
    assert in_sixteen_bits(info.signature) == ["key", "value"]
    assert in_eight_bits(info.signature) == []
    assert as_floats(info.signature) == SIGNATURE
    assert info.details["in_place"] is True
    assert 2 * info.details["cache_row_bytes"] == row_bytes(SIGNATURE)
    given, expected = call(), run(made, call())
    with Engine(info, parse_target("onnxruntime-cpu:threads=1").runner(directory, info)) as engine:
        found = engine._runner.run(given)
        for name, array in expected.items():
            assert found[name].dtype == np.float32
            assert found[name] == pytest.approx(array, rel=1e-2, abs=1e-2)
        exact = [small["greedy"](prompt, 8) for prompt in ([3, 1, 4], [1])]
        assert engine.generate([[3, 1, 4], [1]], 8) == exact


def test_a_cache_that_something_else_reads_is_not_taken_in_float16(tmp_path):
    made = graph("fuse-attention", "cast:to=fp16")
    (cast,) = (use.node for use in made.model.graph.inputs[3].uses())
    other = ir.node("Identity", [made.model.graph.inputs[3]])
    other.outputs[0].name, other.outputs[0].type = "again", made.model.graph.inputs[3].type
    other.outputs[0].shape = made.model.graph.inputs[3].shape
    made.model.graph.insert_before(cast, other)
    made.model.graph.outputs.append(other.outputs[0])
    assert sorted(stored(made, STATES).halves) == ["value"]


def test_caches_that_are_not_updated_in_place_stay_float(tmp_path, monkeypatch):
    monkeypatch.setattr("enginesmith.targets._onnxruntime_states.shares_buffers", lambda path, states: False)
    directory, info, log = built(tmp_path, graph("fuse-attention", "kv-cache:limit=0.5"))
    assert "caches are given and taken as float32: they are not updated in place" in log
    assert in_eight_bits(info.signature) == []
    assert not (directory / FILE).exists()


def test_values_beyond_the_scale_are_clipped_and_halves_rounded_to_even():
    caches = Caches({"key": np.full((1, 1, 1, 1), 0.5, np.float32)})
    given = np.array([0.25, 0.75, -0.25, 63.4, 64, 1e9, -64, -1e9, 0.3], np.float32).reshape(1, 1, 9, 1)
    stored = caches.stored({"key": given, "ids": np.zeros(1)})["key"]
    assert stored.ravel().tolist() == [0, 2, 0, 127, 127, 127, -128, -128, 1]
    assert caches.real("key", stored).ravel().tolist() == [0, 1, 0, 63.5, 63.5, 63.5, -64, -64, 0.5]
    assert caches.given({"key": stored}) == frozenset()
    assert caches.stored({"key": stored})["key"] is stored


@pytest.mark.parametrize("engine", [("fuse-attention",)], indirect=True)
def test_kernels_round_and_clip_alike(engine):
    """Keys of a prompt, by the graph's own kernel, are those that NumPy makes of float caches."""
    made = graph("fuse-attention")
    prompt = next(iter(Prompts()))
    real = run(made, prompt)
    runner = engine._runner
    narrow = {name: scale / 4 for name, scale in runner._caches._scales.items()}  # so that many are clipped
    for value in (tight := engine.graph.clone()).model.graph.initializers.values():
        if value.name in ("key/scale", "value/scale"):
            value.const_value = ir.tensor(narrow[value.name.partition("/")[0]])
    found = run(tight, prompt)
    for name, output in STATES.items():
        expected = Caches(narrow)
        stored = expected.stored({name: real[output]})[name]
        assert (stored == 127).any()
        assert (stored == -128).any()
        assert found[output] == pytest.approx(expected.real(name, stored), rel=1e-6, abs=1e-6)


def test_a_signature_without_caches_has_none_in_8_bits():
    assert in_eight_bits(dataclasses.replace(SIGNATURE, states={})) == []
