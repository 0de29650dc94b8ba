import contextlib
import dataclasses
import queue
import runpy
import threading
from pathlib import Path

import numpy as np
import pytest

from enginesmith.compiler.engine import load
from enginesmith.compiler.generation.choice import Choice
from enginesmith.compiler.generation.continuous import Batcher, Request
from enginesmith.compiler.generation.sampling import Sampling
from enginesmith.compiler.generation.speculative import Speculation
from enginesmith.compiler.generation.steps import caches_of, steps_of
from enginesmith.errors import DataError, EngineError, EngineMismatchError, RecipeError

small = runpy.run_path(str(Path(__file__).parents[3] / "small_decoder.py"))
LONGEST_S = 30


@pytest.fixture(scope="module", params=[True, False], ids=["in place", "copied"])
def runner(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    with load(small["write_bundle"](folder, details={"in_place": request.param})) as engine:
        yield engine._open_runner()


@pytest.fixture
def batcher(runner):
    found = Batcher(runner, small["signature"]())
    yield found
    found.close()


class Text:
    """A request, and what came of it."""

    def __init__(self, prompt, count, *, sampling=None, seed=0, ends=(), take=None):
        self.tokens = []
        self._end = queue.SimpleQueue()
        self.request = Request(
            np.array(prompt), count, Choice(sampling, seed), ends, take or self.tokens.append, self._end.put
        )

    def error(self):
        """Once it has ended: what went wrong."""
        return self._end.get(timeout=LONGEST_S)


class Counting:
    """Calls of a runner, and how many rows each had; those of two tokens and more are prompts."""

    def __init__(self, runner, signature, change=lambda number, logits: logits):
        self._runner, self._signature, self._change = runner, signature, change
        self.rows = []

    def empty_caches(self, batch):
        return caches_of(self._runner, self._signature, batch)

    def steps(self, batch, caches):
        steps = steps_of(self._runner, self._signature, batch, caches)

        def call(ids, past, count):
            if ids.shape[1] == 1:
                self.rows.append(len(ids))
            return self._change(len(self.rows), np.array(steps(ids, past, count)))

        return call


def prompts(count):
    generator = np.random.default_rng(0)
    return [generator.integers(0, small["VOCABULARY"], generator.integers(2, 7)).tolist() for _ in range(count)]


def submit_together(batcher, texts):
    """The first, and the others within its first token, so that the thread cannot be ahead of them."""
    first, *others = texts

    def take(token):
        first.tokens.append(token)
        if len(first.tokens) == 1:
            for text in others:
                batcher.submit(text.request)

    first.request.take = take
    batcher.submit(first.request)


def test_every_request_gets_what_it_gets_alone(batcher):
    generator = np.random.default_rng(1)
    texts = [Text(prompt, int(generator.integers(1, 9))) for prompt in prompts(30)]
    for text in texts:
        batcher.submit(text.request)
    for text in texts:
        assert text.error() is None
        assert text.tokens == small["greedy"](text.request.prompt.tolist(), text.request.max_new_tokens)


def test_requests_share_calls(runner):
    counting = Counting(runner, small["signature"]())
    batcher = Batcher(counting, small["signature"]())
    texts = [Text(prompt, 9) for prompt in prompts(4)]
    submit_together(batcher, texts)
    assert [text.error() for text in texts] == [None] * 4
    batcher.close()
    assert max(counting.rows) == 4
    assert len(counting.rows) < 8 * 4


def test_a_request_that_comes_later_joins_those_under_way(batcher):
    second, joined = Text([2, 7], 3), threading.Event()

    def join(token):
        if not joined.is_set():
            joined.set()
            batcher.submit(second.request)

    first = Text([3, 1, 4], 9, take=join)
    batcher.submit(first.request)
    assert first.error() is None
    assert second.error() is None
    assert second.tokens == small["greedy"]([2, 7], 3)


def test_it_ends_at_a_stop_token(batcher):
    expected = small["greedy"]([3, 1, 4], 8)
    text = Text([3, 1, 4], 8, ends={expected[2]})
    batcher.submit(text.request)
    assert text.error() is None
    assert text.tokens == expected[: expected.index(expected[2]) + 1]


def test_what_is_drawn_depends_on_the_seed_alone(batcher):
    texts = [Text([3, 1, 4], 8, sampling=Sampling(30.0), seed=seed) for seed in (1, 2, 1, 1)]
    for text in texts:
        batcher.submit(text.request)
    assert [text.error() for text in texts] == [None] * 4
    assert texts[0].tokens == texts[2].tokens == texts[3].tokens != texts[1].tokens


def test_a_cancelled_request_ends_and_its_neighbours_go_on(batcher):
    texts = [Text(prompt, 9) for prompt in prompts(4)]
    cancelled = texts[1]
    cancelled.request.take = lambda token: (cancelled.tokens.append(token), cancelled.request.cancel())
    waiting = Text([1, 2], 9)
    waiting.request.cancel()
    for text in (*texts, waiting):
        batcher.submit(text.request)
    assert [text.error() for text in (*texts, waiting)] == [None] * 5
    assert [len(text.tokens) for text in (*texts, waiting)] == [9, 1, 9, 9, 0]
    for text in texts:
        assert text.tokens == small["greedy"](text.request.prompt.tolist(), len(text.tokens))


def test_a_request_that_waits_need_not_wait_for_its_end(runner):
    batcher = Batcher(runner, small["signature"](), rows=1)
    waiting, ended = Text([1, 2], 9), []

    def take(token):
        if not ended:
            batcher.submit(waiting.request).cancel()
        ended.append(not waiting._end.empty())

    text = Text([3, 1, 4], 9, take=take)
    batcher.submit(text.request)
    assert [text.error(), waiting.error()] == [None, None]
    batcher.close()
    assert (ended[0], ended[-1], waiting.tokens) == (False, True, [])


def test_logits_that_are_no_numbers_end_their_row_alone(runner):
    def spoiled(number, logits):
        if number == 4 and len(logits) > 1:
            logits[0] = np.nan
        return logits

    batcher = Batcher(Counting(runner, small["signature"](), spoiled), small["signature"]())
    texts = [Text(prompt, 9) for prompt in prompts(3)]
    submit_together(batcher, texts)
    errors = [text.error() for text in texts]
    batcher.close()
    assert "the engine gives logits that are no numbers" in str(errors[0])
    assert errors[1:] == [None, None]
    for text in texts[1:]:
        assert text.tokens == small["greedy"](text.request.prompt.tolist(), 9)


def test_a_call_that_fails_ends_those_it_was_for(runner):
    def failing(number, logits):
        if number == 3 and len(logits) == 2:
            raise EngineError("the device is gone")
        return logits

    batcher = Batcher(Counting(runner, small["signature"](), failing), small["signature"]())
    texts = [Text([3, 1, 4], 9) for _ in range(2)]
    submit_together(batcher, texts)
    assert [str(text.error()) for text in texts] == ["the device is gone"] * 2
    after = Text([3, 1, 4], 2)
    batcher.submit(after.request)
    assert after.error() is None
    batcher.close()
    assert after.tokens == small["greedy"]([3, 1, 4], 2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("when", [0, 1], ids=["a prompt", "a token"])
def test_after_a_fault_of_our_own_nobody_waits(runner, when):
    def faulty(number, logits):
        if number == when:
            raise ZeroDivisionError("a fault")
        return logits

    batcher = Batcher(Counting(runner, small["signature"](), faulty), small["signature"](), rows=1)
    texts = [Text([3, 1, 4], 9) for _ in range(3)]
    for text in texts:
        with contextlib.suppress(EngineError):  # it may have ended already
            batcher.submit(text.request)
    assert str(texts[0].error()) == "generation ended by a fault: ZeroDivisionError: a fault"
    batcher.close()
    with pytest.raises(EngineError, match="the batcher is closed"):
        batcher.submit(Text([3], 1).request)


def test_closing_finishes_what_was_asked_for(runner):
    batcher = Batcher(runner, small["signature"](), rows=1)
    texts = [Text(prompt, 9) for prompt in prompts(3)]
    for text in texts:
        batcher.submit(text.request)
    batcher.close()
    assert [len(text.tokens) for text in texts] == [9, 9, 9]
    with pytest.raises(EngineError, match="the batcher is closed"):
        batcher.submit(Text([1], 1).request)


def test_requests_that_do_not_fit_are_refused(batcher):
    with pytest.raises(DataError, match="prompt 0 is longer than the cache"):
        batcher.submit(Text([1] * 17, 1).request)
    with pytest.raises(RecipeError, match="max_new_tokens is too small"):
        batcher.submit(Text([1], 0).request)


def test_an_engine_of_a_fixed_number_of_rows_is_refused(runner):
    found = small["signature"]()

    def fixed(specs):
        return tuple(dataclasses.replace(spec, shape=(4, *spec.shape[1:])) for spec in specs)

    found = dataclasses.replace(found, inputs=fixed(found.inputs), outputs=fixed(found.outputs))
    with pytest.raises(EngineMismatchError, match="the engine takes 4 rows at a time"):
        Batcher(runner, found)


class Fixed:
    """A draft of given texts: what comes next in the one that begins so."""

    def __init__(self, texts, change=lambda token: token):
        self._texts, self._change = texts, change
        self.calls = 0

    def run(self, inputs):
        raise AssertionError("a draft keeps its caches itself")

    def empty_caches(self, batch):
        raise AssertionError("a draft keeps its caches itself")

    def steps(self, batch, caches):
        read = []

        def call(ids, past, count, back=None):
            self.calls += 1
            read[past[0] :] = ids[0].tolist()
            (text,) = {tuple(text) for text in self._texts if text[: len(read)] == read} or {(0,) * 99}
            logits = np.zeros((1, small["VOCABULARY"]), np.float32)
            logits[0, self._change((*text, 0)[len(read)])] = 1
            return logits

        return call


def whole(prompt, count):
    return [*prompt, *small["greedy"](prompt, count)]


@pytest.fixture(scope="module", params=[True, False], ids=["in place", "copied"])
def checking(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checking")
    with load(small["write_bundle"](folder, drafted=3, details={"in_place": request.param})) as engine:
        yield engine._open_runner()


@pytest.mark.parametrize(("wrong", "calls"), [(False, 2), (True, 8)])
def test_a_request_that_is_alone_takes_what_a_draft_proposes(checking, wrong, calls):
    draft = Fixed([whole([3, 1, 4], 9)], lambda token: (token + 1) % small["VOCABULARY"] if wrong else token)
    counts = Speculation()
    batcher = Batcher(checking, small["signature"](3), draft=(draft, small["signature"]()), speculation=counts)
    for _ in range(2):  # the second begins as the first did, and the draft reads it again
        text = Text([3, 1, 4], 9)
        batcher.submit(text.request)
        assert text.error() is None
        assert text.tokens == small["greedy"]([3, 1, 4], 9)
    batcher.close()
    assert counts.calls == 2 * calls
    assert counts.tokens == 2 * 8
    assert (counts.accepted == 0) == wrong


def test_requests_that_share_calls_or_are_drawn_go_on_without_a_draft(checking):
    draft = Fixed([])
    counts = Speculation()
    batcher = Batcher(checking, small["signature"](3), draft=(draft, small["signature"]()), speculation=counts)
    drawn = Text([3, 1, 4], 9, sampling=Sampling(temperature=1.0))
    batcher.submit(drawn.request)
    assert drawn.error() is None
    assert draft.calls == counts.calls == 0
    texts = [Text(prompt, 7) for prompt in prompts(3)]
    submit_together(batcher, texts)
    for text in texts:
        assert text.error() is None
        assert text.tokens == small["greedy"](text.request.prompt.tolist(), 7)
    batcher.close()


def test_a_request_that_is_alone_again_is_proposed_to_again(checking):
    """Between the two, tokens came that the draft has not read, over some that it proposed and that were not taken."""
    long, short = [3, 1, 4], [2, 7]
    draft = Fixed([whole(long, 12)])
    counts = Speculation()
    batcher = Batcher(checking, small["signature"](3), draft=(draft, small["signature"]()), speculation=counts)
    second = Text(short, 3)

    def take(token):
        first.tokens.append(token)
        if len(first.tokens) == 3:
            batcher.submit(second.request)

    first = Text(long, 12, take=take)
    batcher.submit(first.request)
    for text in (first, second):
        assert text.error() is None
    batcher.close()
    assert first.tokens == small["greedy"](long, 12)
    assert second.tokens == small["greedy"](short, 3)
    assert counts.accepted > 2


@pytest.mark.parametrize("draft_of_all", [True, False])
def test_the_same_tokens_come_with_any_draft(checking, runner, draft_of_all):
    """A whole engine as the draft, on requests that come one by one and together."""
    batcher = Batcher(checking, small["signature"](3), draft=(runner, small["signature"]()))
    texts = [Text(prompt, 8) for prompt in prompts(6)]
    for text in texts:
        batcher.submit(text.request)
        if draft_of_all:
            assert text.error() is None
    for text in texts:
        assert draft_of_all or text.error() is None
        assert text.tokens == small["greedy"](text.request.prompt.tolist(), 8)
    batcher.close()


def test_an_engine_that_checks_no_drafts_takes_none(runner):
    with pytest.raises(EngineMismatchError, match="the engine checks no drafts"):
        Batcher(runner, small["signature"](), draft=(runner, small["signature"]()))


def test_a_draft_that_fails_ends_its_request(checking, runner):
    class Failing(Fixed):
        def steps(self, batch, caches):
            def call(*_):
                raise EngineError("the draft has failed")

            return call

    batcher = Batcher(checking, small["signature"](3), draft=(Failing([]), small["signature"]()))
    text = Text([3, 1, 4], 5)
    batcher.submit(text.request)
    error = text.error()
    batcher.close()
    assert isinstance(error, EngineError)
    assert "the draft has failed" in str(error)
