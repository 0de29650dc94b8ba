import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest

import enginesmith
from enginesmith.compiler.engine import load
from enginesmith.compiler.generation.generate import generate
from enginesmith.compiler.generation.prefixes import Prefixes
from enginesmith.compiler.generation.speculative import Speculation
from enginesmith.compiler.signature import AxisRange, Signature, TensorSpec
from enginesmith.errors import EngineError, EngineMismatchError, RecipeError

small = runpy.run_path(str(Path(__file__).parents[3] / "small_decoder.py"))
ROOM, VOCABULARY = 32, 10


def signature(drafted=4, room=ROOM, vocabulary=VOCABULARY):
    cache = TensorSpec("text", "float32", (1, 1, room, 1))
    back = [TensorSpec("back", "int64", ("kept",))] if drafted else []
    return Signature(
        inputs=(
            TensorSpec("ids", "int64", (1, "time")), *(TensorSpec(n, "int64", (1,)) for n in ("past", "count")), *back,
            cache,
        ),
        outputs=(
            TensorSpec("logits", "float32", (1, "kept", vocabulary) if drafted else (1, vocabulary)),
            dataclasses.replace(cache, name="text_out"),
        ),
        axes={"time": AxisRange(1, 1, room), **({"kept": AxisRange(1, 1, drafted + 1)} if drafted else {})},
        states={"text": "text_out"},
    )  # fmt: skip


class Told:
    """A runner that keeps tokens themselves in its cache, and finds what a rule says to follow a whole text."""

    def __init__(self, rule):
        self.rule = rule
        self.calls = []

    def run(self, inputs):
        (ids,), (past,), (count,) = inputs["ids"], inputs["past"], inputs["count"]
        cache = inputs["text"].copy()
        assert past + count <= cache.shape[2], "written behind the end of the cache"
        cache[0, 0, past : past + count, 0] = ids
        self.calls.append((int(past), ids.tolist()))
        logits = []
        for back in inputs.get("back", [0]):
            assert 0 <= back < count
            logits.append(np.zeros(VOCABULARY, np.float32))
            logits[-1][self.rule([int(token) for token in cache[0, 0, : past + count - back, 0]])] = 1
        return {"logits": np.stack(logits)[None] if "back" in inputs else logits[0][None], "text_out": cache}


def counting(text):
    return (text[-1] + 1) % VOCABULARY


def wrong(text):
    return (text[-1] + 2) % VOCABULARY


def sometimes(text):
    """Wrong after every token that 3 divides."""
    return (wrong if text[-1] % 3 == 0 else counting)(text)


def answer(
    draft=None, prompt=(1, 2), count=12, *, stop=(), drafted=4, room=ROOM, draft_room=ROOM, stream=None, runner=None
):
    """The tokens, the runners and the counts."""
    runner, other, counts = runner or Told(counting), Told(draft), Speculation()
    (tokens,) = generate(
        runner, signature(drafted, room), list(prompt), max_new_tokens=count, do_sample=False, temperature=None,
        top_k=None, top_p=None, stop=stop, seed=0, stream=stream,
        draft=(other, signature(0, draft_room)) if draft else None, speculation=counts if draft else None,
    )  # fmt: skip
    return tokens, runner, other, counts


@pytest.mark.parametrize(
    ("draft", "expected"),
    [
        (counting, Speculation(proposed=8, accepted=8, calls=3, tokens=11)),  # 1, then 5, 5 and 1
        (wrong, Speculation(proposed=34, accepted=0, calls=11, tokens=11)),  # 4 a time, and fewer near the end
        (sometimes, Speculation(proposed=17, accepted=6, calls=5, tokens=11)),
    ],
)
def test_the_tokens_are_those_without_a_draft(draft, expected):
    tokens, _, _, counts = answer(draft)
    assert tokens == answer()[0] == [(3 + at) % VOCABULARY for at in range(12)]
    assert counts == expected
    assert counts.tokens_per_call == pytest.approx(expected.tokens / expected.calls)
    assert Speculation().tokens_per_call is None


def test_a_draft_reads_each_token_once_and_two_where_all_were_taken():
    _, runner, other, _ = answer(counting, count=12)
    assert runner.calls == [(0, [1, 2]), (2, [3, 4, 5, 6, 7]), (7, [8, 9, 0, 1, 2]), (12, [3])]
    assert other.calls == [
        (0, [1, 2, 3]), (3, [4]), (4, [5]), (5, [6]),  # the prompt and the first token in one call
        (6, [7, 8]), (8, [9]), (9, [0]), (10, [1]),
    ]  # fmt: skip


def test_what_was_not_taken_is_written_over():
    _, runner, other, _ = answer(sometimes, count=8)
    assert runner.calls[1:3] == [(2, [3, 5, 6, 8, 9]), (3, [4, 5, 6, 8, 9])]  # 4 in the place of 5
    assert other.calls[4:6] == [(3, [4]), (4, [5])]


@pytest.mark.parametrize("stop", range(VOCABULARY))
@pytest.mark.parametrize("draft", [counting, wrong, sometimes])
def test_an_end_within_a_draft_is_the_last_token(draft, stop):
    tokens, _, _, counts = answer(draft, stop=[stop])
    assert tokens == answer(stop=[stop])[0]
    assert tokens[-1] == stop
    assert counts.tokens == len(tokens) - 1


@pytest.mark.parametrize("draft", [counting, wrong, sometimes])
@pytest.mark.parametrize("count", range(1, 8))
def test_no_more_tokens_come_than_were_asked_for(draft, count):
    tokens, _, other, counts = answer(draft, count=count)
    assert tokens == answer(count=count)[0]
    assert counts.tokens == count - 1
    assert bool(other.calls) == (count > 2)  # the engine gives the last token by itself


@pytest.mark.parametrize("draft", [counting, wrong, sometimes])
@pytest.mark.parametrize("draft_room", [1, 2, 3, 6, 11, 12, 40])
def test_caches_may_be_filled(draft, draft_room):
    tokens, _, other, counts = answer(draft, count=10, room=12, draft_room=draft_room)
    assert tokens == answer(count=10, room=12)[0]
    assert (counts.proposed > 0) == (draft_room > 2)  # two tokens of the prompt, and the first one
    assert bool(other.calls) == (draft_room > 2)


def test_tokens_are_streamed_as_they_come():
    runner, seen = Told(counting), []
    answer(counting, count=7, runner=runner, stream=lambda row, token: seen.append((row, token, len(runner.calls))))
    assert seen == [(0, 3, 1), (0, 4, 2), (0, 5, 2), (0, 6, 2), (0, 7, 2), (0, 8, 2), (0, 9, 3)]


@pytest.fixture(scope="module", params=[True, False], ids=["in place", "copied"])
def engines(request, tmp_path_factory):
    """One that checks drafts, the same without, and one of other weights."""
    made = {"engine": {"drafted": 3}, "same": {}, "other": {"made": small["model"](seed=1)}}
    opened = {}
    for name, options in made.items():
        folder = tmp_path_factory.mktemp(name)
        opened[name] = load(small["write_bundle"](folder, **options, details={"in_place": request.param}))
    yield opened
    for engine in opened.values():
        engine.close()


@pytest.mark.parametrize("prompt", [[3, 1, 4], [1], [5, 9, 2, 6, 5]])
@pytest.mark.parametrize("draft", ["engine", "same", "other"])
def test_an_engine_gives_its_own_tokens_whatever_the_draft(engines, prompt, draft):
    counts = Speculation()
    count = small["ROOM"] - len(prompt)
    expected = small["greedy"](prompt, count)
    engine = engines["engine"]
    assert engine.generate(prompt, count, draft=engines[draft], speculation=counts) == [expected]
    assert counts.tokens == count - 1
    assert (counts.accepted == counts.proposed) == (draft != "other")


def test_an_engine_that_checks_drafts_is_one_like_any_other(engines):
    prompts = [[3, 1, 4], [1], [5, 9, 2, 6, 5]]
    engine = engines["engine"]
    assert engine.generate(prompts, 8) == [small["greedy"](prompt, 8) for prompt in prompts]
    assert engine.perplexity(prompts[::2]) == pytest.approx(engines["same"].perplexity(prompts[::2]))
    outputs = engine.run({
        "ids": np.array([[3, 1, 4]]), "past": np.array([0]), "count": np.array([3]), "back": np.array([0, 2, 9]),
        **{name: np.zeros((1, small["HEADS"], small["ROOM"], small["WIDTH"]), np.float32) for name in ("key", "value")},
    })  # fmt: skip
    for row, text in zip(outputs["logits"][0], [[3, 1, 4], [3], [3]], strict=True):
        assert row == pytest.approx(small["logits_after"](text), rel=1e-3, abs=1e-3)


def test_known_prefixes_and_counts_of_several_answers(engines):
    known, counts = Prefixes(1 << 20), enginesmith.Speculation()
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    for _ in range(2):
        found = engines["engine"].generate(prompt, 6, prefixes=known, draft=engines["same"], speculation=counts)
        assert found == [small["greedy"](prompt, 6)]
    assert known.reused == len(prompt) - 1
    assert (counts.proposed, counts.accepted, counts.calls, counts.tokens) == (6, 6, 4, 10)


def test_logits_that_are_no_numbers_are_an_error(tmp_path, engines):
    spoilt = small["write_bundle"](tmp_path, small["spoilt"]())
    with load(spoilt) as draft, pytest.raises(EngineError, match=r"(?s)no numbers, for token 1 of a draft.*found: nan"):
        engines["engine"].generate([1, 2], 4, draft=draft)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([1], {"do_sample": True}, r"(?s)a draft is for greedy search.*found: do_sample=True"),
        ([[1], [2]], {}, r"(?s)a draft is for one prompt at a time.*found: 2 prompts.*leave the draft out"),
    ],
)
def test_what_no_draft_is_for_is_refused(engines, prompt, options, message):
    with pytest.raises(RecipeError, match=message):
        engines["engine"].generate(prompt, 4, draft=engines["same"], **options)


def test_counts_without_a_draft_are_refused(engines):
    with pytest.raises(RecipeError, match=r"(?s)speculation counts what a draft brings, and there is none.*draft="):
        engines["engine"].generate([1], 4, speculation=Speculation())


def test_an_engine_that_checks_no_drafts_is_refused(engines):
    message = r"(?s)the engine checks no drafts.*found: ids, past, count\n.*--decoder speculative_tokens=4"
    with pytest.raises(EngineMismatchError, match=message):
        engines["same"].generate([1], 4, draft=engines["engine"])


def test_a_draft_of_another_vocabulary_is_refused(engines):
    draft = Told(counting), signature(0, vocabulary=9)
    message = r"(?s)the draft is of another vocabulary than the engine.*expected: 10 tokens.*found: 9 tokens"
    with pytest.raises(EngineMismatchError, match=message):
        generate(
            Told(counting), signature(), [1], max_new_tokens=2, do_sample=False, temperature=None, top_k=None,
            top_p=None, stop=(), seed=0, stream=None, draft=draft,
        )  # fmt: skip


def test_a_draft_without_a_cache_is_refused(engines):
    plain = Signature(inputs=(TensorSpec("image", "float32", (1, 3)),))
    with pytest.raises(EngineError, match=r"(?s)the engine has no cache.*image:1x3:float32"):
        generate(
            Told(counting), signature(), [1], max_new_tokens=2, do_sample=False, temperature=None, top_k=None,
            top_p=None, stop=(), seed=0, stream=None, draft=(Told(counting), plain),
        )  # fmt: skip
