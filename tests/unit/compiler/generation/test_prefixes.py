import runpy
from pathlib import Path

import numpy as np
import pytest

from enginesmith.compiler.engine import load
from enginesmith.compiler.generation import prefixes as module
from enginesmith.compiler.generation.choice import Choice
from enginesmith.compiler.generation.continuous import Request
from enginesmith.compiler.generation.prefixes import Prefixes
from enginesmith.errors import RecipeError

small = runpy.run_path(str(Path(__file__).parents[3] / "small_decoder.py"))
HEADS, WIDTH, ROOM = small["HEADS"], small["WIDTH"], small["ROOM"]
TOKEN_BYTES = 2 * HEADS * WIDTH * 4


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Texts of a few tokens are kept too."""
    monkeypatch.setattr(module, "LEAST", 2)


@pytest.fixture(scope="module", params=[True, False], ids=["in place", "copied"])
def engine(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    with load(small["write_bundle"](folder, details={"in_place": request.param})) as engine:
        yield engine


def caches(seed=0):
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal((1, HEADS, ROOM, WIDTH), np.float32) for name in ("key", "value")}


def test_prompts_that_begin_alike_give_the_tokens_that_they_give_alone(engine):
    known = Prefixes(1 << 20)
    for prompt in ([3, 1, 4, 1, 5], [3, 1, 4, 2], [3, 1, 4, 1, 5], [9, 1, 4], [3, 1, 4, 1, 5, 9]):
        assert engine.generate(prompt, 6, prefixes=known) == [small["greedy"](prompt, 6)]
    assert known.reused == 3 + 4 + 5
    assert known.read == 5 + 1 + 1 + 3 + 1


def test_requests_of_a_batcher_share_them(engine):
    known = Prefixes(1 << 20)
    found = [[] for _ in range(4)]
    batcher = engine.batcher(prefixes=known)
    for tokens in found:
        batcher.submit(Request(np.array([3, 1, 4, 1]), 6, Choice(None), (), tokens.append, lambda error: None))
    batcher.close()
    assert found == [small["greedy"]([3, 1, 4, 1], 6)] * 4
    assert known.reused == 3 * 3


def test_the_longest_beginning_is_taken():
    known, kept = Prefixes(1 << 20), caches(1)
    known.keep(np.array([1, 2, 3]), kept)
    longer = caches(2)
    known.keep(np.array([1, 2, 4, 5, 6]), longer)
    target = caches(3)
    assert known.take(np.array([1, 2, 4, 5, 7]), target) == 4
    np.testing.assert_array_equal(target["key"][:, :, :4], longer["key"][:, :, :4])
    np.testing.assert_array_equal(target["key"][:, :, 4:], caches(3)["key"][:, :, 4:])


def test_the_last_token_is_always_read():
    known = Prefixes(1 << 20)
    known.keep(np.array([1, 2, 3, 4]), caches())
    assert known.take(np.array([1, 2, 3, 4]), caches()) == 3
    assert known.take(np.array([1, 2]), caches()) == 0


def test_what_is_kept_is_a_copy():
    known, given = Prefixes(1 << 20), caches()
    known.keep(np.array([1, 2, 3]), given)
    given["key"][...] = np.nan
    target = caches()
    known.take(np.array([1, 2, 3, 4]), target)
    assert np.isfinite(target["key"]).all()


def test_what_was_not_used_for_longest_goes_first():
    known = Prefixes(6 * TOKEN_BYTES)
    known.keep(np.array([1, 1, 1]), caches())
    known.keep(np.array([2, 2, 2]), caches())
    known.take(np.array([1, 1, 1, 1]), caches())
    known.keep(np.array([3, 3, 3]), caches())
    assert known.nbytes == 6 * TOKEN_BYTES
    assert [known.take(np.array([n] * 4), caches()) for n in (1, 2, 3)] == [3, 0, 3]


def test_a_longer_text_takes_the_place_of_its_beginning():
    known = Prefixes(1 << 20)
    for length in (3, 5, 4):
        known.keep(np.arange(length), caches())
    assert known.nbytes == 5 * TOKEN_BYTES


def test_a_text_that_does_not_fit_is_not_kept():
    known = Prefixes(3 * TOKEN_BYTES)
    known.keep(np.arange(4), caches())
    assert known.nbytes == 0


def test_wrong_uses_are_refused(engine):
    with pytest.raises(RecipeError, match="a prefix cache has no room"):
        Prefixes(0)
    with pytest.raises(RecipeError, match="prefixes are of one prompt at a time"):
        engine.generate([[1], [2]], 2, prefixes=Prefixes(1))
