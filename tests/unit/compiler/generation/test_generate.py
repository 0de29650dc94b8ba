import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest

from enginesmith.compiler.engine import load
from enginesmith.compiler.generation.generate import check_decoder
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.errors import DataError, EngineError, EngineMismatchError, RecipeError

small = runpy.run_path(str(Path(__file__).parents[3] / "small_decoder.py"))
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5]]


@pytest.fixture(scope="module", params=[True, False], ids=["in place", "copied"])
def engine(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    with load(small["write_bundle"](folder, details={"in_place": request.param})) as engine:
        yield engine


def test_tokens_are_those_without_a_cache(engine):
    assert engine.generate(PROMPTS, 8) == [small["greedy"](prompt, 8) for prompt in PROMPTS]


def test_a_batch_gives_what_each_row_gives_alone(engine):
    together = engine.generate(PROMPTS, 8)
    assert together == [row for prompt in PROMPTS for row in engine.generate(prompt, 8)]
    assert len({tuple(row) for row in together}) == 3


def test_drawn_tokens_depend_on_the_seed_alone(engine):
    first = engine.generate([3, 1, 4], 8, do_sample=True, temperature=30.0, seed=1)
    assert engine.generate([3, 1, 4], 8, do_sample=True, temperature=30.0, seed=1) == first
    assert engine.generate([[3, 1, 4], [1]], 8, do_sample=True, temperature=30.0, seed=1)[:1] == first
    assert engine.generate([3, 1, 4], 8, do_sample=True, temperature=30.0, seed=2) != first
    assert engine.generate([3, 1, 4], 8, do_sample=True, top_k=1) == engine.generate([3, 1, 4], 8)


def test_a_row_ends_at_its_stop_token_and_the_others_go_on(engine):
    rows = engine.generate(PROMPTS, 8)
    stop = rows[0][1]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in rows]
    assert len(expected[0]) < 8
    assert any(len(row) == 8 for row in expected)
    assert engine.generate(PROMPTS, 8, stop=[stop]) == expected
    assert engine.generate(PROMPTS, 8, stop=stop) == expected


def test_tokens_are_streamed_as_they_come(engine):
    seen = []
    rows = engine.generate(PROMPTS[:2], 3, stream=lambda row, token: seen.append((row, token)))
    assert seen == [(row, rows[row][at]) for at in range(3) for row in range(2)]


def test_the_whole_cache_can_be_filled(engine):
    room = small["ROOM"]
    assert engine.generate([1, 2], room - 2) == [small["greedy"]([1, 2], room - 2)]


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([], 4, "there are no prompts"),
        ("text", 4, "prompts are no tokens"),
        ([[1], []], 4, "prompt 1 is empty"),
        (np.zeros(0, np.int64), 4, "there are no prompts"),
        ([[1], [0.5]], 4, "prompt 1 is no row of tokens"),
        ([[1], [[1], [1, 2]]], 4, "prompt 1 is no row of tokens"),
        ([[1], [2, 11]], 4, r"(?s)prompt 1 holds a token that the model does not know.*0 to 10.*found: 11"),
        ([-1], 4, "prompt 0 holds a token that the model does not know"),
        ([1] * 17, 1, r"(?s)prompt 0 is longer than the cache.*at most 16 tokens.*found: 17"),
        ([1] * 14, 3, r"(?s)prompt 0 leaves no room for 3 new tokens.*found: 14 and 3.*at most 2"),
        ([[1]] * 5, 4, r"(?s)5 prompts are more than the engine takes at once.*decoder batch=5"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(engine, prompts, count, message):
    with pytest.raises(DataError, match=message):
        engine.generate(prompts, count)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, r"(?s)max_new_tokens is too small.*found: 0"),
        ({"temperature": 0.5}, r"(?s)temperature says how to sample, and sampling is off.*do_sample=True"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is out of range"),
        ({"do_sample": True, "top_k": 0}, "top_k is out of range"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is out of range"),
        ({"stop": ["."]}, r"(?s)stop is no token.*found: '\.'"),
    ],
)
def test_options_out_of_range_are_refused(engine, options, message):
    with pytest.raises(RecipeError, match=message):
        engine.generate([1, 2], **{"max_new_tokens": 2, **options})


def test_logits_that_are_no_numbers_are_an_error(tmp_path):
    with (
        load(small["write_bundle"](tmp_path, small["spoilt"]())) as engine,
        pytest.raises(EngineError, match=r"(?s)logits that are no numbers, for row 0 at token 1.*found: nan"),
    ):
        engine.generate([1, 2], 4)


def test_an_engine_without_a_cache_generates_nothing():
    plain = Signature(inputs=(TensorSpec("image", "float32", (1, 3)),))
    with pytest.raises(EngineError, match=r"(?s)the engine has no cache.*image:1x3:float32"):
        check_decoder(plain)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("key", ("batch", 2, 16), r"(?s)cache 'key' of the engine has the wrong shape.*found: \('batch', 2, 16\)"),
        ("key", ("batch", 2, "batch", 4), "cache 'key' of the engine has the wrong shape"),
        ("key_out", ("batch", 2, 8, 4), r"(?s)cache 'key' of the engine does not come back as it went in"),
    ],
)
def test_caches_of_another_shape_are_refused(name, shape, message):
    good = small["signature"]()
    changed = [[dataclasses.replace(s, shape=shape) if s.name == name else s for s in specs]
               for specs in (good.inputs, good.outputs)]  # fmt: skip
    wrong = dataclasses.replace(good, inputs=tuple(changed[0]), outputs=tuple(changed[1]))
    check_decoder(good)
    with pytest.raises(EngineMismatchError, match=message):
        check_decoder(wrong)


def test_a_decoder_without_counts_is_refused():
    good = small["signature"]()
    wrong = dataclasses.replace(good, inputs=tuple(s for s in good.inputs if s.name != "count"))
    with pytest.raises(EngineMismatchError, match="the engine has caches, and no 'count'"):
        check_decoder(wrong)


def test_ranges_of_axes_limit_the_batch():
    assert small["signature"]().axes["batch"] == AxisRange(1, 1, 4)


@pytest.mark.parametrize("drafted", [0, 3])
def test_logits_of_another_shape_are_refused(drafted):
    good, other = small["signature"](drafted), small["signature"](0 if drafted else 3)
    check_decoder(good)
    message = rf"(?s)the logits of the engine have the wrong shape.*\(batch, {'kept, ' if drafted else ''}vocabulary\)"
    with pytest.raises(EngineMismatchError, match=message):
        check_decoder(dataclasses.replace(good, outputs=other.outputs))
